"""The network: the function that is trained, in plain PyTorch.

Shape letters, one legend for the whole project; tensors carry them as a suffix (``k_NLGSE``):

| letter | meaning                          | letter | meaning                                  |
|--------|----------------------------------|--------|------------------------------------------|
| B      | rows of a batch                  | C      | chunks of a row                          |
| T      | tokens of a row                  | Q      | tokens of a chunk (T = C * Q)            |
| D      | width                            | K      | references a chunk may read              |
| F      | feed-forward width               | N      | distinct references in a batch           |
| V      | vocabulary                       | R      | tokens of a reference, padded            |
| H      | query heads                      | S      | tokens kept of a reference, per head     |
| G      | key/value heads                  | P      | prefix tokens                            |
| E      | head size                        | X      | size of a search vector                  |
| L      | memory layers                    |        |                                          |
"""
