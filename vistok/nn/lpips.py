"""The `lpips` package's network on a torchvision backbone that was read elsewhere."""

import warnings
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from ..extras import needs


def build_lpips(net: Literal["alex", "vgg"], backbone: Mapping[str, Tensor] | None) -> nn.Module:
    """LPIPS v0.1 with the package's linear layers on a state dict of torchvision's AlexNet or VGG16.

    Only the backbone's `features.*` are used. None leaves backbone and linear layers random: values that mean
    nothing, for tests. Raises ImportError without the package, and ValueError for another network's state.
    """
    with needs("lpips", "lpips", "LPIPS"):
        from lpips import LPIPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by its old argument names
        # The package downloads the backbone on its own unless it is to stay random.
        network = LPIPS(net=net, pretrained=backbone is not None, pnet_rand=True, verbose=False)
    if backbone is not None:
        # slice3.10.weight of lpips is features.10.weight of torchvision
        names = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
        misfits = [
            name
            for key, name in names.items()
            if name not in backbone or backbone[name].shape != network.net.state_dict()[key].shape
        ]
        if misfits:
            raise ValueError(
                f"this is not torchvision's backbone of LPIPS {net!r}: {misfits[0]} is missing or misshapen"
            )
        network.net.load_state_dict({key: backbone[name] for key, name in names.items()})
    return network.requires_grad_(False).eval()
