"""Decoding: every format and pixel layout to RGB, every fault to its code, nothing half decoded."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtengine.vision.decode import DecodeLimits, decode_image
from vtengine.vision.errors import IMAGE_CODES, ImageError

LIMITS = DecodeLimits()
LOSSLESS = (
    ("PNG", {}),
    ("BMP", {}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", {"compression": "packbits"}),
)
LOSSY = (
    ("JPEG", {"quality": 95}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"restart_marker_rows": 1}),
    ("WEBP", {"quality": 95}),
    ("GIF", {}),
    ("TIFF", {"compression": "jpeg"}),
)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that states its size and stops."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from raw scan lines (each with its filter byte) and chunks that stand before them."""
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return png_header(width, height, depth, colour) + extra + pixels + chunk(b"IEND", b"")


def code_of(data: bytes, limits: DecodeLimits = LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, limits)
    assert caught.value.message == str(caught.value)
    return caught.value.code


def readable(data: bytes) -> bytes:
    """A file that this Pillow reads again: before 11.3 its MPO of three frames is broken, before 13 its YCbCr TIFF."""
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError as fault:
        pytest.skip(f"Pillow cannot read the file that it wrote: {fault}")
    return data


# Formats


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_lossless_formats_are_exact(noise, encode, kind: str, options: dict) -> None:
    pixels = decode_image(encode(noise, kind, **options), LIMITS)
    assert np.array_equal(pixels, np.asarray(noise))
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and not pixels.flags.writeable


@pytest.mark.parametrize(("kind", "options"), LOSSY)
def test_lossy_formats_are_close(photo, encode, kind: str, options: dict) -> None:
    pixels = decode_image(encode(photo, kind, **options), LIMITS)
    assert pixels.shape == (64, 96, 3)
    assert np.abs(pixels.astype(int) - np.asarray(photo)).mean() < 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_first_frame_of_several(photo, encode, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    several = encode(photo, kind, save_all=True, append_images=[photo.rotate(180), photo.rotate(90)], **options)
    pixels = decode_image(readable(several), LIMITS)
    assert pixels.shape == (64, 96, 3)
    assert np.abs(pixels.astype(int) - np.asarray(photo)).mean() < 6


def test_one_pixel(encode) -> None:
    for kind in ("PNG", "BMP", "GIF", "TIFF"):
        assert decode_image(encode(Image.new("RGB", (1, 1), (200, 100, 50)), kind), LIMITS).tolist() == [
            [[200, 100, 50]]
        ]


def test_orientation_of_all_eight_kinds(photo, encode) -> None:
    """Every stored orientation comes out upright, in JPEG, PNG, WebP and TIFF, and once only."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }
    upright = np.asarray(photo)
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.fromarray(np.ascontiguousarray(turn(upright)))
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95}), ("TIFF", {})):
            pixels = decode_image(encode(turned, kind, exif=exif, **options), LIMITS)
            assert pixels.shape == upright.shape, (kind, orientation)
            assert np.abs(pixels.astype(int) - upright).mean() < 3, (kind, orientation)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_turns_nothing(photo, encode) -> None:
    broken = encode(photo, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert np.array_equal(decode_image(broken, LIMITS), np.asarray(photo))


# Pixel layouts


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "P", "LA", "RGBA")),
        *(("TIFF", mode) for mode in ("1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr")),
        *(("JPEG", mode) for mode in ("1", "L", "CMYK", "YCbCr")),
    ],
)
def test_modes_become_rgb(photo, encode, kind: str, mode: str) -> None:
    picture = photo.convert("RGBA").convert(mode) if mode in ("LA", "PA") else photo.convert(mode)
    data = encode(picture, kind, **({"quality": 95} if kind == "JPEG" else {}))
    pixels = decode_image(readable(data), LIMITS)
    expected = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(pixels - expected).mean() < (3 if kind == "JPEG" else 0.01)


def test_cmyk_jpeg_is_not_inverted(encode) -> None:
    for stored in ((0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 200)):
        picture = Image.new("CMYK", (16, 16), stored)
        pixels = decode_image(encode(picture, "JPEG", quality=95), LIMITS)
        assert np.abs(pixels.astype(int) - np.asarray(picture.convert("RGB"))).max() < 6


def test_sixteen_bit_gray_keeps_the_high_byte(encode) -> None:
    values = np.array([[0, 255, 256, 4660], [32767, 32768, 65279, 65535]], ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    expected = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert np.array_equal(decode_image(png(4, 2, 16, 0, rows), LIMITS), expected)
    assert np.array_equal(decode_image(encode(Image.fromarray(values.astype("<u2")), "TIFF"), LIMITS), expected)


def test_sixteen_bit_transparent_gray(encode) -> None:
    values = np.array([[4660, 4661]], ">u2")
    data = png(2, 1, 16, 0, b"\0" + values.tobytes(), chunk(b"tRNS", struct.pack(">H", 4660)))
    assert decode_image(data, LIMITS)[0, :, 0].tolist() == [255, 18]


def test_sixteen_bit_colour_and_alpha() -> None:
    colour = np.array([[[65535, 4660, 0], [256, 255, 32768]]], ">u2")
    assert np.array_equal(decode_image(png(2, 1, 16, 2, b"\0" + colour.tobytes()), LIMITS), colour >> 8)
    alpha = np.array([[[4660, 0, 0, 65535], [0, 0, 0, 0]]], ">u2")
    assert decode_image(png(2, 1, 16, 6, b"\0" + alpha.tobytes()), LIMITS).tolist() == [[[18, 0, 0], [255, 255, 255]]]


def test_alpha_lies_over_white(encode) -> None:
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(10, 20, 30, 0), (10, 20, 30, 255), (0, 0, 0, 128)])
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        pixels = decode_image(encode(picture, kind, **options), LIMITS)[0].tolist()
        assert pixels == [[255, 255, 255], [10, 20, 30], [127, 127, 127]], kind


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(encode, kind: str) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 0, 0, 0, 0, 200])
    picture.putdata([0, 1])
    pixels = decode_image(encode(picture, kind, transparency=0), LIMITS)
    assert pixels.tolist() == [[[255, 255, 255], [0, 0, 200]]]


def test_palette_with_an_alpha_for_each_entry(encode) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([0, 0, 0, 0, 0, 200, 0, 200, 0])
    picture.putdata([0, 1, 2])
    pixels = decode_image(encode(picture, "PNG", transparency=bytes([0, 128, 255])), LIMITS)[0].tolist()
    assert pixels[0] == [255, 255, 255] and pixels[2] == [0, 200, 0]
    assert pixels[1] == [127, 127, 227]


def test_transparent_colour_key(encode) -> None:
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (4, 5, 6))
    pixels = decode_image(encode(picture, "PNG", transparency=(1, 2, 3)), LIMITS)
    assert pixels.tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_thirty_two_bit_pixels_are_refused(encode, mode: str) -> None:
    assert code_of(encode(Image.new(mode, (4, 4)), "TIFF")) == "image_unsupported_format"


# Faults


def test_empty_text_and_other_formats(photo, encode) -> None:
    assert code_of(b"") == "image_empty"
    assert code_of(b"this is no image, whatever the file is called\n") == "image_unsupported_format"
    assert code_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "image_unsupported_format"
    for kind in ("PPM", "ICO", "TGA", "PDF", "EPS"):
        assert code_of(encode(photo, kind)) == "image_unsupported_format"


def test_a_narrower_whitelist(photo, encode) -> None:
    limits = DecodeLimits(formats=("PNG",))
    assert code_of(encode(photo, "JPEG"), limits) == "image_unsupported_format"
    assert decode_image(encode(photo, "PNG"), limits).shape == (64, 96, 3)


def test_byte_limit_comes_first(photo, encode) -> None:
    data = encode(photo, "PNG")
    assert code_of(data, DecodeLimits(max_bytes=len(data) - 1)) == "image_too_large_bytes"
    assert decode_image(data, DecodeLimits(max_bytes=len(data))).shape == (64, 96, 3)


def huge_files() -> dict[str, bytes]:
    """Files of a few bytes that state 60000x60000 pixels (16383x16383 where the format allows no more)."""
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
    )
    gif = (
        b"GIF89a"
        + struct.pack("<HHBBB", 60000, 60000, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0)
        + b"\x02\0;"
    )
    frame = struct.pack(">BHHB", 8, 60000, 60000, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    jpeg = (
        b"\xff\xd8\xff\xc0"
        + struct.pack(">H", len(frame) + 2)
        + frame
        + b"\xff\xda\0\x0c"
        + b"\x03\x01\0\x02\0\x03\0\0\x3f\0"
    )
    tags = ((256, 60000), (257, 60000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 60000), (279, 9))
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
    side = (16382).to_bytes(3, "little")
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + side + side
    vp8 = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8 " + struct.pack("<I", 10) + b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"
    vp8l = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f\xff\xff\xff\xff\0\0\0\0\0"
    sizes = {"png": png_header(60000, 60000), "bmp": bmp, "gif": gif, "jpeg": jpeg, "tiff": tiff + b"\0" * 4}
    return sizes | {"webp": webp, "webp lossy": vp8, "webp lossless": vp8l}


@pytest.mark.parametrize(("name", "data"), huge_files().items(), ids=huge_files())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixel_limit_is_checked_on_the_header(name: str, data: bytes) -> None:
    tracemalloc.start()
    try:
        assert code_of(data) == "image_too_many_pixels"
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_pixel_limit_counts_width_times_height(encode) -> None:
    data = encode(Image.new("RGB", (100, 50)), "PNG")
    assert decode_image(data, DecodeLimits(max_pixels=5000)).shape == (50, 100, 3)
    assert code_of(data, DecodeLimits(max_pixels=4999)) == "image_too_many_pixels"
    assert (
        code_of(encode(Image.new("RGB", (100, 50)), "WEBP"), DecodeLimits(max_pixels=4999)) == "image_too_many_pixels"
    )


def test_a_tile_larger_than_the_limit_is_refused() -> None:
    tags = ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (277, 1), (322, 60000), (323, 60000), (324, 8), (325, 9))
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
    assert code_of(tiff + b"\0" * 4) == "image_too_many_pixels"


@pytest.mark.parametrize(("kind", "options"), LOSSLESS + LOSSY)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
def test_a_cut_file_is_an_error_and_never_half_an_image(noise, encode, kind: str, options: dict, capfd) -> None:
    data = encode(noise, kind, **options)
    whole = decode_image(data, LIMITS)
    cuts = {1, 2, 7, 11, 20, len(data) // 2, len(data) - 1, *random.Random(0).sample(range(1, len(data)), 150)}
    for cut in sorted(cuts):
        try:
            pixels = decode_image(data[:cut], LIMITS)
        except ImageError as fault:
            expected = {"image_truncated"} if cut > 11 and kind != "TIFF" else {*IMAGE_CODES}
            assert fault.code in expected | ({"image_corrupt"} if kind == "GIF" else set()), (cut, str(fault))
        else:  # only what stands after the last pixel is missing
            assert np.array_equal(pixels, whole), cut
    capfd.readouterr()  # libjpeg talks


def test_truncation_switch_of_another_library_is_noticed(noise, encode, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(encode(noise, "PNG"), LIMITS)


@pytest.mark.parametrize(("kind", "options"), LOSSLESS + LOSSY)
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_nothing_but_image_errors(photo, encode, kind: str, options: dict, capfd) -> None:
    data = encode(photo, kind, **options)
    chance = random.Random(1)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 2, 8))):
            damaged[chance.choice((chance.randrange(min(64, len(data))), chance.randrange(len(data))))] = (
                chance.randrange(256)
            )
        try:
            pixels = decode_image(bytes(damaged), DecodeLimits(max_pixels=1 << 20))
            assert pixels.ndim == 3 and pixels.shape[2] == 3
        except ImageError as fault:
            assert fault.code in IMAGE_CODES
    capfd.readouterr()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 1 << 40}, "max_pixels"),
        ({"formats": ("SVG",)}, "formats"),
    ],
)
def test_limits_that_mean_nothing_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"decode.{named}"):
        DecodeLimits(**options)
