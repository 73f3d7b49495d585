"""What the reasons mean that things in shards are counted under."""

from collections.abc import Mapping

EXPLANATIONS: Mapping[str, str] = {
    # Damage to an archive.
    "damaged_header": "no header stands where one should; reading went on at the next one",
    "truncated": "the file ends inside a member",
    "zeroed_block": "zeros stand where a header should; reading went on at the next one",
    "behind_end_mark": "something stands behind the end of the archive, as where two were joined; it was read too",
    "no_end_mark": "the archive ends without its mark: it was cut off, or its writer leaves the mark out",
    "missing_bytes": "a member runs into the next one, since bytes of it are missing",
    "unreadable_shard": "the shard is no tar, or is gone",
    "changed_since_indexed": "this is not what was indexed; index it with --again if it is right",
    # Members that are no files.
    "link": "a link to another member; write the file itself",
    "sparse_file": "a sparse file; write it whole",
    "special_file": "a device, a pipe or a member of an unknown kind",
    # Samples.
    "missing_caption": "a picture without a caption",
    "missing_image": "files without a picture",
    "duplicate_key": "a key that the shard had before; the first one counts",
    "dotted_key": "a key ends at its first dot, as webdataset reads it: write photo-1.jpg for photo.1.jpg",
    "empty_image": "the file is empty",
    "not_an_image": "no picture of a known format",
    "broken_image": "a picture that does not decode to its end",
    "too_many_pixels": "a decompression bomb",
    "empty_caption": "a caption without a word",
    "caption_not_utf8": "a caption that is no text: not UTF-8, or with zero bytes",
    "short_read": "the shard ends before it",
    # What is not meant to be a sample.
    "apple_double": "files ._*, which macOS adds",
    "metadata": "files __*__",
    "no_key": "hidden files, and files without an extension",
    "further_text": "texts beyond the 64 most frequent kinds, which can be no captions",
}
