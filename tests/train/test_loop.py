"""The training loop: Adam as torch has it, interrupted anywhere, never worse than its start."""

import pytest
import torch
from safetensors.torch import save_file

from skimlm.errors import SkimError
from skimlm.train.loop import BETAS, Objective, cosine, descend, evenly, passes, write_state

TARGET = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
START = {"x": torch.zeros(2, 2), "still": torch.ones(3)}


def loss(x):
    return ((x - TARGET) ** 2 * torch.tensor([1.0, 10.0])).sum()


def gradients(values, step):
    x = values["x"].clone().requires_grad_()
    (loss(x) * (1 + step % 3)).backward()
    return {"x": (x.grad, 0.3)}


def held_out(values):
    return float(loss(values["x"]))


OBJECTIVE = Objective(gradients, held_out)


def test_steps_are_those_of_adam_in_torch():
    x = torch.zeros(2, 2, requires_grad=True)
    adam = torch.optim.Adam([x], lr=0.3, betas=BETAS)
    for step in range(20):
        adam.param_groups[0]["lr"] = 0.3 * cosine(step, 20)
        adam.zero_grad()
        (loss(x) * (1 + step % 3)).backward()
        adam.step()
    state = descend(START, OBJECTIVE, 20, checks=evenly(20, 4))
    torch.testing.assert_close(state.values["x"], x.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(state.values["still"], torch.ones(3))
    assert not START["x"].any()
    assert len(state.losses) == 5 and min(state.losses) < state.losses[0]


def test_the_rate_rises_over_a_twentieth_and_falls_to_nothing():
    rates = [cosine(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.996], abs=1e-3)
    assert rates[50] == pytest.approx(0.5) and rates[99] < 1e-3
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_uphill_the_start_is_kept():
    def uphill(values, step):
        return {n: (-g, rate) for n, (g, rate) in gradients(values, step).items()}

    state = descend(START, Objective(uphill, held_out), 12, checks=evenly(12, 3))
    assert state.losses == sorted(state.losses) and torch.equal(state.best["x"], START["x"])
    assert not torch.equal(state.values["x"], START["x"])


@pytest.mark.parametrize("at", [1, 5, 6, 7, 11])
def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path, at):
    whole = descend(START, OBJECTIVE, 12, checks=evenly(12, 4))
    file, taken = tmp_path / "state", []

    def stop(step):
        if step == at:
            raise KeyboardInterrupt

    def counted(values, step):
        taken.append(step)
        return gradients(values, step)

    with pytest.raises(KeyboardInterrupt):
        descend(START, OBJECTIVE, 12, checks=evenly(12, 4), file=file, progress=stop)
    again = descend(START, Objective(counted, held_out), 12, checks=evenly(12, 4), file=file)
    assert taken == list(range((at - 1) // 3 * 3, 12))  # from the last check on
    assert again.losses == whole.losses
    for part in ("values", "first", "second", "best"):
        for name, value in getattr(whole, part).items():
            assert torch.equal(getattr(again, part)[name], value)


def test_files_of_other_things_are_refused(tmp_path):
    file = tmp_path / "state"
    still = Objective(lambda *_: {}, lambda _: 1.0)
    descend({"x": torch.zeros(3)}, still, 1, checks={1}, file=file)
    for damage in (lambda: None, lambda: file.write_bytes(b"x"), lambda: save_file(START, file)):
        damage()
        with pytest.raises(SkimError, match=r"state: damaged state of a training .*delete it"):
            descend(START, OBJECTIVE, 1, checks=evenly(1, 1), file=file)
    write_state(None, None)  # no file, nothing to keep


def test_windows_are_read_equally_often():
    order = sum(passes(7, 17, 4, 3), [])
    assert len(order) == 17 and passes(7, 4, 2) == passes(7, 4, 2, 0)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and passes(7, 17, 4, 4) != passes(7, 17, 4, 3)


def test_values_are_brought_back_to_where_they_may_be_after_every_step():
    def project(values):
        values["x"].clamp_(max=1.0)

    objective = Objective(gradients, held_out, project)
    state = descend(START, objective, 30, checks=evenly(30, 10))
    assert state.values["x"].max() == 1.0 and state.best["x"].max() == 1.0


def test_a_training_ends_where_it_is_told_and_a_resumed_one_stays_there(tmp_path):
    def few(state):
        return len(state.losses) > 2

    objective = Objective(gradients, held_out, note=lambda step: {"after": step})
    how = dict(checks={3, 5, 9}, done=few, file=tmp_path / "state")
    state = descend(START, objective, 9, **how)
    assert state.step == 5 and state.notes == [{"after": 0}, {"after": 3}, {"after": 5}]
    again = descend(START, objective, 9, **how)
    assert again.step == 5 and again.losses == state.losses and again.notes == state.notes


def test_the_moments_decay_as_asked():
    x = torch.zeros(2, 2, requires_grad=True)
    adam = torch.optim.Adam([x], lr=0.3, betas=(0.7, 0.999))
    for step in range(9):
        adam.zero_grad()
        (loss(x) * (1 + step % 3)).backward()
        adam.step()
    how = dict(checks={9}, schedule=lambda step, steps: 1.0, betas=(0.7, 0.999))
    state = descend(START, OBJECTIVE, 9, **how)
    torch.testing.assert_close(state.values["x"], x.detach(), rtol=1e-5, atol=1e-6)
