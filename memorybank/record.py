"""The bytes of one memory on disk.

    offset 0                    L*G*S*E numbers     L*G*S*E numbers     L*G*S numbers
    | keys, memory type         | values, memory type | kept tokens, int16 |

Numbers stand in the order layer, head, kept token, element (``LGSE``), little endian; the kept tokens are
positions in the reference, -1 where a short reference had none left. There is no header: every record of a
generation has the same length, which its manifest states beside the layout that gives the bytes meaning.

Not here: lossy records (a codec decides how keys and values become bytes) and files (store.py).
"""

from dataclasses import dataclass

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class MemoryShape:
    """The shape of one memory: memory layers, key/value heads, tokens kept, head size."""

    num_layers: int
    num_kv_heads: int
    tokens_kept: int
    head_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> "MemoryShape":
        """Return the shape of the memories that a model writes."""
        return cls(config.num_memory_layers, config.num_kv_heads, config.tokens_kept, config.head_size)

    @property
    def num_kept(self) -> int:
        """Entries of a memory: kept tokens over all layers and heads."""
        return self.num_layers * self.num_kv_heads * self.tokens_kept

    def record_bytes(self, bytes_per_number: int) -> int:
        """Return the length of a record that keeps keys and values as they are."""
        return 2 * self.num_kept * self.head_size * bytes_per_number + 2 * self.num_kept


def record_bytes(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Return the bytes of one memory of a model, by default in bfloat16."""
    return MemoryShape.of(config).record_bytes(bytes_per_number)
