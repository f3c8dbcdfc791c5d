"""The training loop learns whatever an objective describes: here a line and its adversary, no tokenizer."""

import itertools
import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from vistok.train import loop, objectives, recipe
from vistok.train.config import OptimizerConfig, RunConfig
from vistok.train.loop import train
from vistok.train.objective import Objective
from vistok.train.optimizers import build_optimizers

OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup=0, schedule="constant", weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class LineConfig(RunConfig):
    slope: float
    adversary_from: int | None = None


class LineObjective(Objective):
    """Fits y = slope · x, offered as a mapping of tensors."""

    config_class = LineConfig

    def __init__(self, config, device, progress):
        self.config, self.model = config, nn.Linear(1, 1)
        self.weights = {"square": 1.0, "decay": 1e-4}
        self.prepared = False
        if config.adversary_from is not None:
            self.adversary, self.adversary_start = nn.Linear(1, 1), config.adversary_from
            self.adversary_optimizer = OPTIMIZER

    def batches(self, start, rank, world_size):
        for number in itertools.count(start):
            x = torch.randn(self.config.batch_size, 1, generator=torch.Generator().manual_seed(number))
            yield {"x": x, "y": self.config.slope * x}

    def prepare(self):
        with torch.no_grad():
            self.model.bias.zero_()
        self.prepared = True

    def loss(self, batch, step):
        error = self.model(batch["x"]) - batch["y"]
        square = error.square().mean()
        return {
            "square": square,
            "decay": self.model.weight.square().sum(),
            "largest": error.abs().max().detach(),
        }

    def adversary_loss(self, batch):
        return self.adversary(batch["x"]).square().mean()

    def extra_figures(self, batch):
        return {"slope": self.model.weight.detach().squeeze()}

    def validate(self, model, picture):
        return {"validation_error": abs(float(model.weight) - self.config.slope)}

    def export(self, model, folder):
        folder.mkdir(exist_ok=True)
        (folder / "line.json").write_text(json.dumps({"slope": float(model.weight)}))

    def state(self):
        return {} if self.adversary is None else {"adversary": self.adversary.state_dict()}

    def restore(self, state):
        if self.adversary is not None:
            self.adversary.load_state_dict(state["adversary"])


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The objective as one that the loop and recipes know."""
    all_of_them = {**objectives.objectives(), "line": LineObjective}
    for module in (objectives, recipe):
        monkeypatch.setattr(module, "objectives", lambda: all_of_them)


def config(**changes):
    settings = {"slope": 3.0, "steps": 200, "batch_size": 16, "precision": "no", "workers": 0}
    settings |= {
        "optimizer": OPTIMIZER,
        "ema": 0.5,
        "log_every": 20,
        "checkpoint_every": 40,
        "validate_every": 100,
    }
    return LineConfig(**settings | changes)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_loop_minimises_the_weighted_sum_and_logs_every_scalar(tmp_path):
    folder = train(config(), tmp_path, progress=False)
    assert json.loads((folder / "line.json").read_text())["slope"] == pytest.approx(3.0, abs=0.05)
    logged = rows(tmp_path)
    first, last = logged[0], logged[-2]
    assert {"loss", "square", "decay", "largest", "slope", "step"} <= set(first)
    assert first["loss"] == pytest.approx(first["square"] + 1e-4 * first["decay"])
    assert last["square"] < 1e-3 < first["square"] and logged[-1]["validation_error"] < 0.05


@pytest.mark.parametrize("adversary", [None, 30])
def test_a_run_that_goes_on_ends_where_an_uninterrupted_one_does(tmp_path, adversary):
    settings = config(steps=100, adversary_from=adversary)
    whole = train(settings, tmp_path / "whole", progress=False)
    train(settings, tmp_path / "parts", steps=50, progress=False)
    parts = train(settings, tmp_path / "parts", progress=False)
    assert (whole / "line.json").read_text() == (parts / "line.json").read_text()
    assert rows(tmp_path / "whole")[-1] == rows(tmp_path / "parts")[-1]


class TwoLayers(nn.Module):
    """A matrix that Muon updates, and a head that stays with AdamW."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(1, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.hidden(x))

    @property
    def weight(self):
        return (self.head.weight @ self.hidden.weight).squeeze()

    @property
    def bias(self):
        return self.head.bias


MUON = OptimizerConfig(
    kind="muon",
    learning_rate=0.02,
    end_learning_rate=0.0,
    warmup=5,
    schedule="wsd",
    decay=20,
    weight_decay=0.0,
)


@pytest.fixture
def two_layers(monkeypatch):
    initialise = LineObjective.__init__

    def with_two_layers(self, *arguments):
        initialise(self, *arguments)
        self.model, self.weights = TwoLayers(), {"square": 1.0}

    monkeypatch.setattr(LineObjective, "__init__", with_two_layers)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
def test_a_run_with_muon_learns_and_goes_on_exactly(tmp_path, two_layers):
    settings = config(steps=100, optimizer=MUON)
    whole = train(settings, tmp_path / "whole", progress=False)
    train(settings, tmp_path / "parts", steps=50, progress=False)
    parts = train(settings, tmp_path / "parts", progress=False)
    assert (whole / "line.json").read_text() == (parts / "line.json").read_text()
    assert json.loads((whole / "line.json").read_text())["slope"] == pytest.approx(3.0, abs=0.1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")
def test_muon_updates_matrices_of_hidden_layers_and_nothing_else():
    named = list(TwoLayers().named_parameters())
    muon, adamw = build_optimizers(named, MUON)
    names = {id(parameter): name for name, parameter in named}

    def updated(optimizer):
        return sorted(names[id(p)] for group in optimizer.param_groups for p in group["params"])

    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    assert updated(muon) == ["hidden.weight"]
    assert updated(adamw) == ["head.bias", "head.weight", "hidden.bias"]
    with pytest.raises(ValueError, match="no parameter that trains is a matrix"):
        build_optimizers(named[1:2], MUON)


def test_a_run_may_be_made_longer_before_its_learning_rate_decays(tmp_path):
    wsd = OptimizerConfig(learning_rate=0.05, warmup=0, schedule="wsd", decay=20, weight_decay=0.0)
    longer = replace(wsd, decay=40)
    whole = train(config(steps=160, optimizer=longer), tmp_path / "whole", progress=False)
    train(config(steps=100, optimizer=wsd), tmp_path / "parts", steps=80, progress=False)
    parts = train(config(steps=160, optimizer=longer), tmp_path / "parts", progress=False)
    assert (whole / "line.json").read_text() == (parts / "line.json").read_text()


def test_prepare_runs_before_the_first_step_of_a_new_run_only(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(LineObjective, "prepare", lambda self: calls.append(1))
    train(config(steps=80), tmp_path, steps=40, progress=False)
    train(config(steps=80), tmp_path, progress=False)
    assert calls == [1]


def test_a_recipe_names_its_objective(tmp_path):
    path = tmp_path / "line.yaml"
    path.write_text("objective: line\nslope: 2\nsteps: 10\nbatch_size: 4\n")
    assert recipe.read(path) == LineConfig(slope=2.0, steps=10, batch_size=4)
    path.write_text("objective: curve\nslope: 2\n")
    with pytest.raises(
        ValueError, match=r"objective is 'curve'; it is one of .*scenes_vlm, .*tokenizer, line"
    ):
        recipe.read(path)


def test_a_configuration_of_no_objective_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"a RunConfig is not the configuration of a run; give one of \w+,"):
        loop.train(RunConfig(steps=1, batch_size=1), tmp_path)
