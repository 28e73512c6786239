"""Layout of a store and arithmetic of rows and shards. A row is one corpus input; R consecutive rows are a shard; a
shard of one array is one Zarr chunk. Nothing is read or written here."""

import math
import re
from typing import Literal, get_args

from mmkd.base.errors import UserError

FORMAT_VERSION = 2
MAX_ROWS_PER_SHARD = 16384
MIN_ROWS_PER_SHARD = 256
MAX_SHARDS = 1 << 20
"""Maximum shards of a store: 17 billion rows at the usual size. More is an attack or an accident."""
SHARDS_PER_PACK = 32
"""Of large shards, or few: half a million rows at most, half a gigabyte for 512 float16 values."""
MAX_SHARDS_PER_PACK = 4096
FOLDED_SHARDS = 1000
"""Shards whose ledger entries are folded into one file."""
FOLDED_PARTS = 64
"""Shards whose sample parts are folded into one file, once all of them are finished: a million rows at most."""
MAX_DIM = 1 << 14
"""Width of a feature; a shard's chunk then stays below 1 GiB."""

Encoding = Literal["float16", "float32", "int8"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
"""How features lie in arrays; see `mmkd.store.encoding`."""
CODECS = ("blosc", "zstd", "gzip")
"""Compression of an archive. blosc: zstd of byte-shuffled values, level 5. zstd: level 19. gzip: level 9. CRC32C comes
last in each."""

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = get_args(Tower)

IMAGE_SOUND = 1
"""Bit of `valid`: the image feature is finite with a norm above zero, its input could be decoded."""
TEXT_SOUND = 2
"""Bit of `valid`: the text feature is finite with a norm above zero, its input is not empty."""
SOUND_BIT: dict[Tower, int] = {"image": IMAGE_SOUND, "text": TEXT_SOUND}
TOWER_INPUTS: dict[Tower, str] = {"image": "images", "text": "captions"}
OTHER_TOWER: dict[Tower, Tower] = {"image": "text", "text": "image"}
PAIR_SOUND = IMAGE_SOUND | TEXT_SOUND

# A slug becomes a folder name: no separators, no leading dot, so it can never leave `teachers/`.
_SLUG = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,63}")


def rows_per_shard(rows: int, workers: int = 1) -> int:
    """Return a power of two from 256 to 16384: the largest that gives `rows` rows about eight shards, and each of
    `workers` at least four of equal length with a tenth of their time idle at most. Smaller shards end where the format
    could hold only eight times as many."""
    power = 1 << max(0, (math.ceil(rows / 8) - 1).bit_length())
    chosen = min(MAX_ROWS_PER_SHARD, max(MIN_ROWS_PER_SHARD, power))
    while chosen > MIN_ROWS_PER_SHARD and (shards := shard_count(rows, chosen)) < MAX_SHARDS // 16:
        rounds = -(-shards // workers)
        if shards >= 4 * workers and 10 * rounds * workers <= 11 * shards:
            break
        chosen //= 2
    return chosen


def shards_per_pack(rows: int, per_shard: int) -> int:
    """Return a power of two: as many rows in a pack for small shards as for large ones, unless there are fewer."""
    whole = SHARDS_PER_PACK * MAX_ROWS_PER_SHARD // per_shard
    return min(whole, max(SHARDS_PER_PACK, 1 << (shard_count(rows, per_shard) - 1).bit_length()))


def shard_count(rows: int, per_shard: int) -> int:
    """Return shards that hold `rows` rows; the last one may be part full."""
    return -(-rows // per_shard)


def is_slug(name: str) -> bool:
    return bool(_SLUG.fullmatch(name)) and ".." not in name


def check_slug(slug: str, *, what: str = "teacher") -> str:
    """Return `slug` if it may name a folder. Raises UserError otherwise."""
    if not is_slug(slug):
        raise UserError(
            f"{what} name {slug!r} cannot be a folder name: use up to 64 lower-case letters, digits, '-', '_', '.' "
            "and start with a letter or digit"
        )
    return slug


def sample_part(shard: int) -> str:
    return f"samples/{shard:05d}.parquet"


def folded_parts(shard: int) -> str:
    """Return the file that holds the folded sample parts of a shard and its neighbors."""
    return f"samples/folded/{shard // FOLDED_PARTS:05d}.parquet"


def teacher_group(slug: str) -> str:
    return f"teachers/{slug}"


def ledger_entry(shard: int, slug: str) -> str:
    return f"ledger/{shard:05d}.{slug}.json"


def folded_entries(shard: int) -> str:
    """Return the file that holds the folded entries of a shard and its neighbors."""
    return f"ledger/folded/{shard // FOLDED_SHARDS:05d}.jsonl"
