"""References in, memories out: search vectors, index, neighbours, records, banks."""
