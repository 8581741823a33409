"""TensorFlow's checkpoint files: what is read from them, and what is said of damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsimclr.models.crc32c import crc32c, masked
from fastsimclr.models.tf_bundle import Bundle, BundleError
from tests.models.tf_writer import MAGIC, block, mask, message, number, slow_crc32c, varint, write_bundle

RNG = np.random.default_rng(1)
VALUES = {
    "a/float32": RNG.normal(size=(3, 5, 2)).astype(np.float32),
    "a/float64": RNG.normal(size=7),
    "b/int32": np.arange(-3, 3, dtype=np.int32),
    "b/int64": np.array(250228, np.int64),
    "c/float16": RNG.normal(size=(1, 3)).astype(np.float16),
    "c/nothing": np.zeros((0, 4), np.float32),
    "d/bfloat16": torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).bfloat16(),
    **{f"many/variable_{i}": RNG.normal(size=i).astype(np.float32) for i in range(40)},
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "model.ckpt-7", VALUES, shards=3)


def index(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")


def shard(prefix: Path, number: int, of: int = 3) -> Path:
    return prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{of:05d}")


def said(source: Path, name: str | None = None) -> str:
    """What the refusal of a checkpoint, or of one tensor of it, says."""
    with pytest.raises(BundleError) as caught:
        Bundle(source) if name is None else Bundle(source).read(name)
    return str(caught.value)


def test_crc32c_of_known_data() -> None:
    # RFC 3720, appendix B.4, and the check value of every catalogue of CRCs.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    assert crc32c(b"") == 0


def test_crc32c_at_every_length() -> None:
    data = RNG.integers(0, 256, 100_003, dtype=np.uint8).tobytes()
    for length in (*range(70), 255, 256, 257, 4095, 65_540, 100_003):
        assert crc32c(data[:length]) == slow_crc32c(data[:length]), length
        assert masked(crc32c(data[:length])) == mask(slow_crc32c(data[:length])), length


@pytest.mark.parametrize("shards", [1, 3])
def test_everything_that_was_written_is_read(tmp_path: Path, shards: int) -> None:
    bundle = Bundle(write_bundle(tmp_path / "x", VALUES, shards=shards))
    assert bundle.names == tuple(sorted(VALUES))
    for name, value in VALUES.items():
        found = bundle.read(name)
        expected = value.float().numpy() if isinstance(value, torch.Tensor) else value
        assert bundle.dtype(name) == ("bfloat16" if isinstance(value, torch.Tensor) else expected.dtype.name)
        assert (bundle.shape(name), found.shape, found.dtype) == (expected.shape, expected.shape, expected.dtype)
        np.testing.assert_array_equal(found, expected)
    assert "a/float32" in bundle and "a/float33" not in bundle


def test_a_checkpoint_is_found_by_prefix_file_and_folder(prefix: Path) -> None:
    for source in (prefix, index(prefix), shard(prefix, 1), prefix.parent):
        assert Bundle(source).prefix == prefix, source
    write_bundle(prefix.with_name("model.ckpt-9"), {"x": np.zeros(1, np.float32)})
    assert "2 *.index" in said(prefix.parent)
    listing = prefix.parent / "checkpoint"
    # The machine that trained wrote its own folder.
    listing.write_text('model_checkpoint_path: "/elsewhere/run/model.ckpt-9"\nall_model_checkpoint_paths: "x"\n')
    assert Bundle(prefix.parent).names == ("x",)
    listing.write_text("nothing")
    assert f"{listing} has no line model_checkpoint_path" in said(prefix.parent)


def test_a_missing_name_is_named_with_those_like_it(prefix: Path) -> None:
    text = said(prefix, "many/variable_99")
    assert f"{index(prefix)} has no many/variable_99" in text and "many/variable_9" in text


def test_missing_files_are_named(prefix: Path) -> None:
    shard(prefix, 1).unlink()
    assert f"{shard(prefix, 1)} is not a file, the checkpoint has 3" in said(prefix)
    index(prefix).unlink()
    assert f"{index(prefix)} is not a file" in said(prefix)
    assert f"{prefix.parent / 'absent.index'} is not a file" in said(prefix.parent / "absent")


def test_truncated_data_are_refused_before_anything_is_read(prefix: Path) -> None:
    path = shard(prefix, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    text = said(prefix)
    assert f"{path} is truncated: it has {len(whole) - 1} bytes" in text and f"ends at {len(whole)}" in text
    assert "copy the checkpoint's files again" in text


def test_a_flipped_bit_of_the_data_is_found_in_its_tensor_alone(prefix: Path) -> None:
    paths = {number: bytearray(shard(prefix, number).read_bytes()) for number in range(3)}
    name = sorted(VALUES)[0]  # the first tensor lies at the start of the first file
    paths[0][5] ^= 0x10
    shard(prefix, 0).write_bytes(paths[0])
    text = said(prefix, name)
    assert str(shard(prefix, 0)) in text and name in text and "checksum" in text and "damaged" in text
    for other in sorted(VALUES)[1:]:
        Bundle(prefix).read(other)


def test_a_truncated_or_foreign_index_is_refused(prefix: Path) -> None:
    whole = index(prefix).read_bytes()
    for length in (0, 10, 47, 48, len(whole) // 2, len(whole) - 1):
        index(prefix).write_bytes(whole[:length])
        assert f"{index(prefix)} ({length} bytes) does not end as an index" in said(prefix)
    index(prefix).write_bytes(whole[100:])  # a good end of nothing
    assert str(index(prefix)) in said(prefix)


def test_no_flipped_bit_of_the_index_goes_unseen(prefix: Path) -> None:
    whole, good = index(prefix).read_bytes(), Bundle(prefix)
    footer = len(whole) - 48
    for at in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[at] ^= 0x04
        index(prefix).write_bytes(damaged)
        try:
            found = Bundle(prefix)
        except BundleError as error:
            assert str(index(prefix)) in str(error)
        else:  # in the footer, what is not read: the index of what is not there, and padding
            assert footer <= at < len(whole) - 8 and found._entries == good._entries, at


def test_what_this_reader_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    one = {"x": np.ones(3, np.float32), "words": np.zeros(2, np.int64)}
    assert "is compressed (kind 1, 1 is Snappy)" in said(write_bundle(tmp_path / "snappy", one, compression=1))
    assert "big-endian" in said(write_bundle(tmp_path / "big", one, header=number(2, 1)))
    text = said(write_bundle(tmp_path / "words", one, kinds={"words": 7}), "words")
    assert "words is of type 7; only float32" in text
    text = said(write_bundle(tmp_path / "wide", one, kinds={"x": 2}), "x")
    assert "x [3] of float64 has 12 bytes, not 24" in text


def test_entries_of_slices_and_of_files_that_are_not_there(tmp_path: Path) -> None:
    entry = number(1, 1) + message(2, message(2, number(1, 1))) + number(5, 4)
    for extra, text in ((message(7, b""), "x is saved in slices"), (number(3, 5), "x lies in file 5 of 1")):
        pairs = [(b"", number(1, 1)), (b"x", entry + extra)]
        data = block(pairs, 0)
        tail = block([(b"x", varint(0) + varint(len(data) - 5))], 0)
        handle = varint(len(data)) + varint(len(tail) - 5)
        footer = (handle + handle).ljust(40, b"\0") + struct.pack("<Q", MAGIC)
        (tmp_path / "one.index").write_bytes(data + tail + footer)
        (tmp_path / "one.data-00000-of-00001").write_bytes(bytes(4))
        assert text in said(tmp_path / "one")
