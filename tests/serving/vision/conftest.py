"""One tiny classifier's export, one backbone's, and a server over the first for all tests of this folder."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from running_server import running
from tiny_exports import write_export


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("classifier"), "timm-vit")


@pytest.fixture(scope="session")
def server(export):
    limits = ("--max-body-mb", "2", "--max-pixels", "1000000")
    with running(export, "--max-batch", "4", "--threads", "1", *limits) as found:
        yield found


@pytest.fixture(scope="session")
def picture():
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def png(picture):
    return encoded(picture, "PNG")


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()
