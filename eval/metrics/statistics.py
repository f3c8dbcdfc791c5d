"""Mean and covariance of features, streamed and mergeable, and the Fréchet distance between two of them."""

import hashlib
import io
import math
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ...files import atomic_write, check_source

LARGEST_FILE = 2**30  # bytes of a .npz, and of an array in it; sigma of 2048 features has 2**25
# What reading a damaged zip file raises; one that seems encrypted is a RuntimeError.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error)
ROUNDING = 1e-6  # of the largest value, as statistics in single precision have it
# Columns that one product covers, so that the half of a symmetric or triangular matrix is passed over.
PANEL = 256


@dataclass(frozen=True)
class Gaussian:
    """The statistics of a set of images for FID: `mean` [D] and `covariance` [D, D] (n-1), float64 on the
    CPU.

    `count` is the number of images, None where a file does not record it. `source` is the file that they were
    read from, beside which the square root of the covariance is kept.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    source: Path | None = field(default=None, compare=False, repr=False)

    @cached_property
    def root(self) -> Tensor:
        """A with A Aᵀ = covariance, [D, rank]: a lower triangle where the rank is D.

        It takes about as long as the rest of a Fréchet distance. Of statistics from a file it is read from
        FILE.root.npy, and written there where the folder can be written to.
        """
        if self.source is None:
            return _root(self.covariance)
        kept = self.source.with_name(f"{self.source.name}.root.npy")
        root = _read_root(kept, self.covariance)
        if root is None:
            root = _root(self.covariance)
            with suppress(OSError), atomic_write(kept) as aside, open(aside, "wb") as file:
                np.save(file, root.numpy())
        return root

    @property
    def digest(self) -> str:
        """Digest of mean, covariance and count: other statistics have another digest."""
        digest = hashlib.sha256(str(self.count).encode())
        for values in (self.mean, self.covariance):
            digest.update(values.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a .npz with `mu` and `sigma` (and `count`), as ADM, pytorch-fid and `save` write them.

        Other arrays of the file are not read. Raises FileNotFoundError, and ValueError for what is not a
        .npz, has no mu and sigma, or holds numbers that are not a mean and covariance.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no file {path}; give a .npz with the arrays mu [D] and sigma [D, D]")
        check_source(path, limit=LARGEST_FILE)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is not a .npz file, or a broken one; give a .npz with mu and sigma")
        try:
            mean, covariance, count = _read_arrays(path)
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged ({error}); fetch it again") from error
        size = mean.numel()
        if mean.shape != (size,) or covariance.shape != (size, size) or not size:
            raise ValueError(
                f"{path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}; they must be [D] and "
                "[D, D]"
            )
        statistics = cls(mean, covariance, count, path)
        try:
            statistics.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}: compute the statistics again") from error
        return statistics

    def check(self) -> None:
        """Raise ValueError for values that are not finite, and for a covariance that cannot be one.

        It must be symmetric and have no negative eigenvalue, both up to rounding in single precision. What
        has passed once is not looked at again.
        """
        if "_passed" in self.__dict__:
            return
        self._check()
        self.__dict__["_passed"] = True

    def _check(self) -> None:
        covariance = self.covariance
        if not (self.mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mu or sigma holds values that are not finite")
        largest = float(covariance.abs().max())
        if not torch.allclose(covariance, covariance.T, rtol=1e-6, atol=ROUNDING * largest):
            raise ValueError("sigma is not symmetric, so it is not a covariance")
        # Cholesky's decomposition exists where no eigenvalue is negative, and takes a tenth of the time.
        slack = ROUNDING * max(largest, float(covariance.diagonal().sum()))
        shifted = covariance + slack * torch.eye(len(covariance), dtype=covariance.dtype)
        if int(torch.linalg.cholesky_ex(shifted).info):
            least = float(torch.linalg.eigvalsh(covariance)[0])
            if least < -slack:
                raise ValueError(f"sigma has the eigenvalue {least:.3g}, so it is not a covariance")

    def save(self, path: str | Path) -> None:
        """Write mu and sigma (and count, where it is known) to a .npz, as a temporary file that is then
        renamed."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["count"] = np.array(self.count)
        with atomic_write(path) as aside, open(aside, "wb") as file:
            np.savez(file, **arrays)


def _read_arrays(path: Path) -> tuple[Tensor, Tensor, int | None]:
    """mu, sigma and the number of images of a .npz, which is not read before its sizes are known."""
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in entries}
        if not {"mu", "sigma"} <= set(sizes):
            raise ValueError(_no_statistics(path, list(sizes)))
        for name in ("mu", "sigma"):
            if sizes[name] > LARGEST_FILE:
                raise ValueError(
                    f"{path}: {name} has {sizes[name]:,} bytes; at most {LARGEST_FILE:,} are read"
                )
        arrays = [_read_array(archive, path, name) for name in ("mu", "sigma")]
        count = _read_array(archive, path, "count") if "count" in sizes else None
    if count is not None and (count.size != 1 or not 1 <= count.item() < 2**53):
        raise ValueError(f"{path}: count is not the number of images")
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in arrays)
    return mean, covariance, None if count is None else int(count.item())


def _read_array(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    """An array of numbers, if it has the bytes that its header states."""
    content = archive.read(f"{name}.npy")
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        if version not in {(1, 0), (2, 0)}:
            raise ValueError(f"format {version}")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
        if dtype.kind not in "fiu":
            raise ValueError(f"it is of {dtype}")
        if math.prod(shape) * dtype.itemsize != len(content) - file.tell():
            raise ValueError("its header states another size")
        file.seek(0)
        return np.load(file)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {name} is not an array of numbers ({error}); fetch it again") from error


def _no_statistics(path: Path, names: list[str]) -> str:
    advice = "give a file of statistics (mu and sigma), or the images themselves as a folder"
    if "arr_0" in names:
        advice = "arr_0 is a batch of samples: write them out as images and give their folder"
    elif "pool_3" in names:
        advice = "pool_3 are features: save their mean and covariance (n-1) as mu and sigma"
    return f"{path} has no mu and sigma (it holds {', '.join(names) or 'nothing'}); {advice}"


class FeatureStatistics:
    """Streaming mean and covariance of feature vectors of `dim` numbers, in float64.

    Memory is one [D, D] matrix, however many images pass. The sums are kept around the running mean, so no
    digits cancel; parts merge to what one pass gives, to rounding. `device` may be a CUDA device that the
    features already are on. Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances" (1979).
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # on and above the diagonal

    @property
    def dim(self) -> int:
        """D, the length of a feature vector."""
        return self._mean.numel()

    def update(self, features: Tensor) -> None:
        """Add a batch [B, D] of any floating dtype. ValueError for other shapes and values that are not
        finite, which would spoil everything after them."""
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise ValueError(
                f"features are {features.dtype} {list(features.shape)}; these statistics take floats "
                f"[B, {self.dim}]"
            )
        if not len(features):
            return
        features = features.detach().to(self._mean.device).double()
        mean = features.mean(0)
        if not mean.isfinite().all():  # one value that is not finite makes its column's mean not finite
            rows = (~features.isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"features of rows {rows[:10]} of the batch are not finite: look at these images, or run the "
                "extractor in float32"
            )
        self._combine(mean, features - mean, len(features))

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the images of `other`. ValueError when the dimensions differ."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of {other.dim} features into those of {self.dim}")
        if other.count:
            self._scatter += other._scatter.to(self._scatter.device)
            mean = other._mean.to(self._mean.device)
            self._combine(mean, self._scatter.new_zeros(0, self.dim), other.count)

    def _combine(self, mean: Tensor, centred: Tensor, count: int) -> None:
        """Move to the common mean; `centred` are the rows whose products are not yet in the scatter."""
        total = self.count + count
        shift = mean - self._mean
        # The shift of the mean is one more row of the same product.
        rows = torch.cat([centred, (shift * (self.count * count / total) ** 0.5)[None]])
        for first in range(0, self.dim, PANEL):
            columns = rows[:, first : first + PANEL]
            self._scatter[first : first + PANEL, first:].addmm_(columns.T, rows[:, first:])
        self._mean += shift * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean [D], float64. ValueError before the first image."""
        self._need(1, "a mean")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """Covariance [D, D] with n-1, float64. ValueError under two images."""
        self._need(2, "a covariance")
        upper = self._scatter.triu()
        return (upper + upper.triu(1).T) / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """The current mean, covariance and count, on the CPU."""
        return Gaussian(self.mean.cpu(), self.covariance.cpu(), self.count)

    def save(self, path: str | Path) -> None:
        """Write mu, sigma and count to a .npz that `Gaussian.load`, and the field's tools, read."""
        self.gaussian().save(path)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as three tensors, not copied: `count`, `mean` [D], `scatter` [D, D]."""
        return {"count": torch.tensor(self.count), "mean": self._mean, "scatter": self._scatter}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state returned by `state_dict`; ValueError for statistics of another dimension."""
        shapes = {"count": [], "mean": [self.dim], "scatter": [self.dim, self.dim]}
        state_shapes = {name: list(value.shape) for name, value in state.items()}
        if state_shapes != shapes:
            raise ValueError(
                f"this state has {state_shapes}; statistics of {self.dim} features have {shapes}"
            )
        self.count = int(state["count"])
        self._mean.copy_(state["mean"])
        self._scatter.copy_(state["scatter"])

    def _need(self, images: int, what: str) -> None:
        if self.count < images:
            raise ValueError(
                f"{what} of features needs at least {images} image{'s' * (images > 1)}; these statistics saw "
                f"{self.count}: look at which images were read"
            )


def frechet_distance(a: Gaussian | FeatureStatistics, b: Gaussian | FeatureStatistics) -> float:
    """Fréchet distance |μ₁-μ₂|² + tr(Σ₁) + tr(Σ₂) - 2 tr((Σ₁Σ₂)^½) between two sets of features.

    The last trace is the sum of the roots of the eigenvalues of a symmetric Aᵀ Σ₂ A, A Aᵀ = Σ₁, in float64.
    ValueError when the dimensions differ, or for a covariance that cannot be one (see `Gaussian.check`).
    "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (2017, arXiv
    1706.08500), equation 6.
    """
    for name, side in (("first", a), ("second", b)):
        if isinstance(side, Gaussian):
            try:
                side.check()
            except ValueError as error:
                raise ValueError(f"the {name} side: {error}") from error
    a, b = (side.gaussian() if isinstance(side, FeatureStatistics) else side for side in (a, b))
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {a.mean.numel()} and {b.mean.numel()} features cannot be compared: take both "
            "from the same layer of the same network"
        )
    shift = a.mean - b.mean
    traces = a.covariance.trace() + b.covariance.trace()
    # Rounding of the traces can make a distance of zero slightly negative.
    return max(0.0, float(shift @ shift + traces) - 2 * _root_trace(a, b))


def _root_trace(a: Gaussian, b: Gaussian) -> float:
    """tr((Σ₁Σ₂)^½) = Σ √λ(Aᵀ Σ₂ A) for any A with A Aᵀ = Σ₁: of a side whose root is known, else of the one
    with fewer images."""
    unknown = a.mean.numel() + 1
    first, second = sorted((a, b), key=lambda side: ("root" not in side.__dict__, side.count or unknown))
    root = first.root
    is_triangle = root.shape[0] == root.shape[1]
    product = (
        _triangular_product(root, second.covariance) if is_triangle else root.T @ second.covariance @ root
    )
    # Half of the time of NumPy's.
    return float(torch.linalg.eigvalsh(product, UPLO="L").clamp_min(0).sqrt().sum())


def _root(covariance: Tensor) -> Tensor:
    rounding = len(covariance) * torch.finfo(torch.float64).eps
    factor, failed = torch.linalg.cholesky_ex(covariance)  # a tenth of the time of eigenvectors
    least = factor.diagonal().square().min()
    if not int(failed) and least > rounding * covariance.diagonal().max():
        return factor
    # Fewer images than features leave directions without variance. Dropped, they cannot return as √rounding.
    values, vectors = torch.linalg.eigh(covariance)
    real = values > rounding * values[-1]
    return vectors[:, real] * values[real].sqrt()


def _read_root(path: Path, covariance: Tensor) -> Tensor | None:
    """The root in a file, if it is one of this covariance; None for another, a damaged or a missing one."""
    try:
        root = torch.from_numpy(np.load(check_source(path, limit=LARGEST_FILE)))
    except (OSError, ValueError, EOFError, TypeError):  # the last where it is an archive
        return None
    if root.dtype != torch.float64 or root.ndim != 2 or len(root) != len(covariance):
        return None
    rows = torch.linspace(0, len(root) - 1, 16).long()  # another covariance differs in all of them
    largest = float(covariance.diagonal().max())
    is_root = torch.allclose(root[rows] @ root.T, covariance[rows], rtol=1e-9, atol=1e-12 * largest)
    return root if is_root else None


def _triangular_product(factor: Tensor, matrix: Tensor) -> Tensor:
    """Lᵀ S L of a lower triangle L, on and below the diagonal, by panels that pass over its zeros: a third of
    the work."""
    half, product = torch.empty_like(matrix), torch.zeros_like(matrix)
    panels = [slice(first, first + PANEL) for first in range(0, len(matrix), PANEL)]
    for panel in panels:
        half[:, panel] = matrix[:, panel.start :] @ factor[panel.start :, panel]
    for panel in panels:
        product[panel, : panel.stop] = factor[panel.start :, panel].T @ half[panel.start :, : panel.stop]
    return product
