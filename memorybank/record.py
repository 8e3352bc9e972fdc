"""The bytes of one memory on disk.

    offset 0                L*G*S vectors        L*G*S vectors          L*G*S bytes
    | keys, by the codec    | values, by the codec | kept tokens, uint8 |

Vectors stand in the order layer, head, kept token (``LGS``), each as many bytes as the codec says, the same for all;
the kept tokens are positions in the reference, 255 where a short reference had none left. There is no header: every
record of a generation has the same length, which its manifest states beside the layout that gives the bytes meaning.

At the paper's size (22 layers, 8 heads, 8 tokens, head size 80) the vectors take 450,560 bytes in bfloat16 and 39,424
through the paper's quantiser, and the kept tokens, which the paper does not count, 1,408 more in either case.

Not here: how a vector becomes bytes (codec.py, quantizer.py) and files (store.py).
"""

from dataclasses import dataclass

from model.config import ModelConfig

NO_TOKEN = 255
"""Stands for the token that a short reference did not have."""


@dataclass(frozen=True, slots=True)
class MemoryShape:
    """The shape of one memory: memory layers, key/value heads, tokens kept, head size."""

    num_layers: int
    num_kv_heads: int
    tokens_kept: int
    head_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> "MemoryShape":
        """Return the shape of the memories that a model writes.

        Raises:
            ValueError: positions in its references do not fit a byte.
        """
        if config.reference_tokens > NO_TOKEN:
            raise ValueError(
                f"model.reference_tokens={config.reference_tokens}: records keep positions in a reference as "
                f"single bytes; set at most {NO_TOKEN}"
            )
        return cls(config.num_memory_layers, config.num_kv_heads, config.tokens_kept, config.head_size)

    @property
    def num_kept(self) -> int:
        """Entries of a memory: kept tokens over all layers and heads."""
        return self.num_layers * self.num_kv_heads * self.tokens_kept

    def memory_bytes(self, vector_bytes: int) -> int:
        """Return the bytes of a memory's keys and values: what the paper counts."""
        return 2 * self.num_kept * vector_bytes

    def record_bytes(self, vector_bytes: int) -> int:
        """Return the length of a record: keys, values and kept tokens."""
        return self.memory_bytes(vector_bytes) + self.num_kept
