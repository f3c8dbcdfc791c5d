"""CLIP similarity of every image to its reference, by open_clip."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint import SUFFIXES
from ...extras import needs
from .image import check_pair
from .metric import Metric
from .precision import full_precision
from .weights import WeightsMissing, find

OPTION = "--clip-weights"


class ClipSimilarity:
    """Cosine between CLIP's embeddings of images and references, both float [B, 3, H, W] in [0, 1] -> [B].

    Images are resized and cropped as in the model's own preprocessing. In [-1, 1], 1 where both are
    equal. Raises ValueError for other shapes or ranges, TypeError for integer images.
    "Learning Transferable Visual Models From Natural Language Supervision" (2021, arXiv 2103.00020).
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        from open_clip import get_model_preprocess_cfg
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.device = torch.device(device)
        self.model = model.requires_grad_(False).eval().to(self.device)
        config = PreprocessCfg(**get_model_preprocess_cfg(model))
        steps = image_transform_v2(config, is_train=False).transforms
        # The other steps turn Pillow's images into tensors; releases before 3.3 do not pass tensors through.
        *self.resize_and_crop, self.normalize = (step for step in steps if isinstance(step, nn.Module))

    @torch.inference_mode()
    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """One cosine per image."""
        check_pair(images, references)
        if images.shape[1] != 3:
            raise ValueError(f"images are {list(images.shape)}; CLIP takes [B, 3, H, W]")
        with full_precision():
            embeddings = [
                self.model.encode_image(self._prepare(batch), normalize=True)
                for batch in (images, references)
            ]
        return (embeddings[0] * embeddings[1]).sum(-1)  # [B, E] -> [B]

    def _prepare(self, images: Tensor) -> Tensor:
        images = images.to(self.device).float()
        for step in self.resize_and_crop:
            images = step(images)
        return self.normalize(images.clamp(0, 1))  # bicubic leaves the range of 8-bit pictures


def load_clip(
    name: str = "ViT-B-32", weights: str | Path = "openai", device: torch.device | str = "cpu"
) -> ClipSimilarity:
    """open_clip's model `name` with the weights of a pretrained tag in the local caches, or of a file.

    Raises WeightsMissing, without any download, where they are absent, and ValueError for a name or tag that
    open_clip does not know and for weights of another model.
    """
    with needs("open_clip_torch", "clip", "CLIP similarity"):
        import open_clip

    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}; open_clip.list_models() returns their names")
    config = open_clip.get_pretrained_cfg(name, str(weights))
    path = _cached(name, str(weights), config) if config else _file(name, Path(weights).expanduser())
    training = {key: config[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in config}
    try:
        model = open_clip.create_model(
            name,
            pretrained=str(path),
            force_quick_gelu=config.get("quick_gelu", False),
            force_preprocess_cfg=training,
        )
    except Exception as error:  # another model's keys and damaged files raise many kinds
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} does not hold the weights of {name} ({type(error).__name__}: {cause})"
        ) from error
    return ClipSimilarity(model, device)


def _cached(name: str, tag: str, config: Mapping[str, Any]) -> Path:
    """The file of a published tag in the hub's cache or in open_clip's own."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    metric, url = f"CLIP similarity ({name}, {tag})", config["url"]
    repo, _, file = config["hf_hub"].rpartition("/")
    if not repo:
        folder = Path("~/.cache/clip").expanduser()
        return find(None, [url.rsplit("/", 1)[1]], folder, metric=metric, url=url, option=OPTION)
    files = [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME] if file in ("", HF_WEIGHTS_NAME) else [file]
    for candidate in files:
        if isinstance(path := try_to_load_from_cache(repo, candidate), str):
            return Path(path)
    raise WeightsMissing(
        f"{metric} needs {files[0]} of {repo}, which is not in the hub's cache: fetch "
        f"https://huggingface.co/{repo}/resolve/main/{files[0]} and give its path with {OPTION}"
    )


def _file(name: str, path: Path) -> Path:
    from open_clip import list_pretrained_tags_by_model

    if path.is_file():
        return path
    tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
    if path.suffix in SUFFIXES:
        raise WeightsMissing(
            f"CLIP similarity: no file {path}; {OPTION} takes a weights file or a tag ({tags})"
        )
    raise ValueError(f"{path} is neither a weights file nor a pretrained tag of {name}; its tags are {tags}")


METRICS = (
    Metric(
        "clip",
        "CLIP similarity",
        better="higher",
        needs="open_clip and its weights",
        make=lambda files, device: load_clip(files.clip_model, files.clip, device),
        rank=5,
    ),
)
