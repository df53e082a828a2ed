"""Real audio and real weights, wherever they can be had; a test that needs them says why it is skipped."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path

import numpy as np
import pytest

from whisper_at_cli.extract.errors import UsageError

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the shared reference data are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def esc10(shared) -> Path:
    return shared / "data" / "esc10"


@pytest.fixture(scope="session")
def tiny_en() -> Path:
    """The CTranslate2 folder of the real tiny.en weights."""
    from whisper_at_cli.extract.backbones.weights import demo_weights_folder

    try:
        return demo_weights_folder()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def esc10_cache(esc10, tiny_en, tmp_path_factory):
    """ESC-10 through tiny.en, extracted once for all tests."""
    from whisper_at_cli.extract import FeatureCache, extract

    path = tmp_path_factory.mktemp("esc10") / "esc10.zarr"
    report = extract(esc10, path, model=tiny_en)
    assert (report.clips, report.written, report.failed) == (400, 400, 0)
    return FeatureCache.open(path)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium that can reach no host, and records what it asks for."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (program and driver):
        pytest.skip("Chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    switches = (
        "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking mute-audio "
        "disable-component-update disable-sync autoplay-policy=no-user-gesture-required window-size=1200,900 "
    )
    for switch in (*switches.split(), "host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def write_wav(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    """A 16-bit WAV file; samples (n,) or (n, channels) in [-1, 1]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.atleast_2d(samples.T).T
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def noise(seed: int, seconds: float, rate: int = 16000) -> np.ndarray:
    """Coloured noise with a level and a slope of its own."""
    rng = np.random.default_rng(seed)
    white = rng.normal(size=round(seconds * rate))
    return np.convolve(white, rng.normal(size=16), mode="same") * 0.05


@pytest.fixture
def noise_folder(tmp_path) -> Path:
    """Two classes of six clips of 1 to 2.2 s."""
    for index in range(12):
        write_wav(tmp_path / "noises" / ("low", "high")[index % 2] / f"{index:02d}.wav", noise(index, 1 + index / 10))
    return tmp_path / "noises"


def array_bytes(path: Path | str) -> dict[str, bytes]:
    """Every file of a cache whose processes have ended, also in a bucket: chunks, metadata and the merged log, without
    the group's own provenance and its copy, locks and files' times.
    """
    from whisper_at_cli.extract.cache.metadata import COPY
    from whisper_at_cli.extract.cache.store import location

    store = location(path)
    left_out = ("/.locks/", "digest/c", COPY)
    names = [name for name in store.sizes() if "/" in name and not any(part in name for part in left_out)]
    return {name: store.read(name) for name in names}


def make_backbone(seed: int = 0, *, precision: str = "float32"):
    """A Whisper backbone of random weights, small and fast; the same for the same seed."""
    import torch

    from whisper_at_cli.extract.backbones.encoder import WhisperEncoder
    from whisper_at_cli.extract.backbones.load import WhisperBackbone

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = WhisperEncoder(mels=80, layers=3, dim=64, heads=2)
    return WhisperBackbone(
        encoder, name=f"random{seed}", weights_sha256=str(seed), device=torch.device("cpu"), precision=precision
    )


@pytest.fixture(scope="session")
def random_backbone():
    return make_backbone()
