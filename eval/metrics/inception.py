"""The InceptionV3 of FID, KID, precision and recall: torch-fidelity's port of TensorFlow's."""

import io
from pathlib import Path

import torch
from torch import Tensor

from ... import checkpoint
from ...extras import needs
from .precision import full_precision
from .weights import find, hub_folder

FEATURES, CLASSES = 2048, 1008
# One file under two names: torch-fidelity's own download, and the one that pytorch-fid uses.
NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + NAMES[0]
OPTION = "--inception-weights"


class Inception:
    """Images uint8 [B, 3, H, W] -> features float32 [B, 2048] and logits float32 [B, 1008], on its device.

    The logits are without the last layer's bias, as the Inception score takes them. The images are resized to
    299 x 299 as in TensorFlow 1, so give them at the size at which they are evaluated. Raises TypeError for
    other dtypes and ValueError for other shapes.
    """

    def __init__(self, state: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        with needs("torch-fidelity", "eval", "Inception"):
            from torch_fidelity import FeatureExtractorInceptionV3

        # The package unpickles any path, and downloads without one; a buffer avoids both.
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
            )
        except RuntimeError as error:
            cause = str(error).split("\n")[1].strip()[:120]
            raise ValueError(f"these weights are not torch-fidelity's InceptionV3: {cause} …") from error
        self.device = torch.device(device)
        self.network.to(self.device, memory_format=torch.channels_last)  # 1.5 times as fast on CPUs

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of a batch."""
        if images.dtype != torch.uint8:
            raise TypeError(
                f"Inception takes uint8 images in 0..255; got {images.dtype}: clamp to [0, 1], multiply by "
                "255, round and convert"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception takes images [B, 3, H, W]; got {list(images.shape)}")
        with full_precision():
            return self.network(images.to(self.device))


def load_inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> Inception:
    """torch-fidelity's InceptionV3 from a file, a folder that holds it, or torch hub's cache when None.

    Raises WeightsMissing, without any download, where the file is absent, and ValueError for other weights.
    """
    path = find(
        weights, NAMES, hub_folder(), metric="FID (and every Inception metric)", url=URL, option=OPTION
    )
    try:
        return Inception(checkpoint.read(path), device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
