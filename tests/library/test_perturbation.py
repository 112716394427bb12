"""The move itself: exact, in memory that is used again, and undone wherever it is interrupted."""

import math
import sys
import weakref

import pytest
import torch
from tiny import Examples, assert_equal, bert, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lsam import LSAMConfig
from hf_lsam.perturbation import Perturbation, add_along, orthogonal_part, where, zero_unless
from hf_lsam.step import LSAMStep


class Stop(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_move_and_restore_are_exact(dtype):
    torch.manual_seed(0)
    weights_, directions = [], []
    for shape in ((7,), (3, 5), ()):
        weights_.append(torch.randn(shape).to(dtype))
        directions.append(torch.randn(shape).to(dtype))
    before = [weight.clone() for weight in weights_]
    perturbation = Perturbation()
    for _ in range(2):
        with pytest.raises(Stop), perturbation.moved(weights_, directions, 0.5) as copies:
            assert all(torch.equal(copy, old) for copy, old in zip(copies, before, strict=True))
            for weight, old, direction in zip(weights_, before, directions, strict=True):
                exact = old.float() + 0.5 * direction.float()
                # Those of 16 bits go to either neighbour.
                slack = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * exact.abs()
                assert bool(((weight.float() - exact).abs() <= slack).all()) and not torch.equal(weight, old)
            weights_[0].fill_(math.nan)
            raise Stop
        assert all(torch.equal(weight, old) for weight, old in zip(weights_, before, strict=True))


WATCHED = ("/hf_lsam/ascent.py", "/hf_lsam/perturbation.py", "/hf_lsam/second_pass.py", "/contextlib.py")


class Interrupts:
    """A trace that counts the interpreter's steps in some files, and raises Ctrl-C at the `at`-th of them."""

    def __init__(self, at=None):
        self.count, self.at = 0, at

    def __call__(self, frame, event, arg):
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not path.endswith(WATCHED) and name not in ("_gradients", "_perturb_and_rerun", "_one_pass"):
            return None
        frame.f_trace_opcodes = True
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("ascent", ["current", "previous"])
def test_an_interrupt_at_any_step_of_the_interpreter_leaves_the_weights_as_they_were(ascent):
    """Also where a `with` block is entered or left; the error is kept, and with it what its frames refer to."""

    def interrupted(at):
        model, batch = bert(blocks=2).train(), Examples(4).batch(0, 4)

        def run():
            loss = model(**batch).loss
            loss.backward()
            return loss.detach()

        step = LSAMStep(model, LSAMConfig(rho=0.5, block_selection="all", ascent_gradient=ascent), max_steps=2)
        if ascent == "previous":
            step(run, run, 0, True)
        before, interrupts, error = weights(model), Interrupts(at), None
        sys.settrace(interrupts)
        try:
            step(run, run, int(ascent == "previous"), True)
        except KeyboardInterrupt as raised:
            error = raised
        finally:
            sys.settrace(None)
        assert (error is None) == (at is None)
        assert_equal(weights(model), before)
        return interrupts.count

    interrupted(None)  # what is done but once is done now
    steps = interrupted(None)
    assert steps > 500
    for at in range(1, steps, steps // 60):
        interrupted(at)


def test_moved_weights_reuse_their_memory():
    perturbation = Perturbation()
    addresses = set()
    for count in (3, 2, 3, 1):
        tensors = [torch.ones(4) for _ in range(count)]
        with perturbation.moved(tensors, tensors, 1.0):
            addresses.add(tensors[0].data_ptr())
    assert len(addresses) == 1


def test_casts_that_autocast_has_kept_are_not_used_at_other_weights():
    """It keeps the cast of a leaf that takes gradients until its outermost block is left."""
    weight, ones = torch.ones(4, 4, requires_grad=True), torch.ones(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [(ones @ weight).sum().item()]
        with Perturbation().moved([weight], [torch.ones(4, 4)], 1.0):
            outputs.append((ones @ weight).sum().item())
        outputs.append((ones @ weight).sum().item())
    assert outputs == [16.0, 32.0, 16.0]


def test_copies_last_until_the_next_move_and_take_turns_with_it_in_memory():
    """What one pass keeps from a step to the next: a fresh copy of every gradient costs more than the move."""
    perturbation, kept, expected = Perturbation(), [], []
    with Live() as live:
        tensors = [torch.randn(3, 4).T, torch.randn(5)]
        size = live.now
        for turn in range(5):
            if turn > 0:
                with perturbation.moved(tensors, kept, 0.5):
                    assert all(torch.equal(copy, old) for copy, old in zip(kept, expected, strict=True))
            gradients = [tensor * turn for tensor in tensors]
            kept, expected = perturbation.copies(gradients), [gradient.clone() for gradient in gradients]
            torch._foreach_zero_(gradients)
            assert [copy.stride() for copy in kept] == [tensor.stride() for tensor in tensors]
            assert all(torch.equal(copy, old) for copy, old in zip(kept, expected, strict=True))
            del gradients
            # The weights, what is expected and the copies, and from the first move on one buffer more.
            assert live.now == (3 if turn == 0 else 4) * size


def test_weights_go_back_to_their_own_memory_and_keep_their_strides():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    weights_ = [image, torch.randn(3, 4).T, torch.randn(6, 4)[::2, ::2], torch.randn(())]
    before = [(weight.data_ptr(), weight.stride(), weight.clone()) for weight in weights_]
    with Perturbation().moved(weights_, weights_, 0.5):
        assert image.is_contiguous(memory_format=torch.channels_last)
        for weight, (address, _, old) in zip(weights_, before, strict=True):
            assert weight.data_ptr() != address and torch.equal(weight, old + 0.5 * old)
    for weight, (address, stride, old) in zip(weights_, before, strict=True):
        assert weight.data_ptr() == address and weight.stride() == stride and torch.equal(weight, old)


def test_a_choice_by_a_condition_on_the_device_does_not_wait_for_it():
    """A tensor on `meta` has no value: reading the condition would raise."""
    one, other = ([torch.empty(3, device="meta")] for _ in range(2))
    chosen = where(torch.empty((), dtype=torch.bool, device="meta"), one, other)
    assert [tensor.shape for tensor in chosen] == [(3,)]
    values, others = [torch.ones(2)], [torch.zeros(2)]
    assert where(torch.tensor(True), values, others)[0] is values[0]
    assert where(torch.tensor(False), values, others)[0] is others[0]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside and are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if storage not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self.add, -storage.nbytes())
                self.add(storage.nbytes())
        return result

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def test_the_part_that_looksam_reuses_is_made_without_other_copies_of_the_weights():
    perturbed, plain = ([torch.randn(1000) for _ in range(20)] for _ in range(2))
    with Live() as live:
        parts = orthogonal_part(perturbed, plain)
    size = sum(part.nbytes for part in parts)
    assert live.now >= size and live.peak < 1.1 * size
    finite = torch.tensor(True)
    with Live() as live:
        kept = zero_unless(finite, parts)
    assert live.peak <= finite.nbytes and kept[0] is parts[0]


def test_what_is_not_finite_is_replaced_by_zeros_without_waiting_for_the_device():
    chosen = zero_unless(torch.empty((), dtype=torch.bool, device="meta"), [torch.empty(3, device="meta")])
    assert [(tensor.shape, tensor.dtype) for tensor in chosen] == [((3,), torch.float32)]
    assert torch.equal(zero_unless(torch.tensor(False), [torch.full((2,), math.nan)])[0], torch.zeros(2))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_does_not_spread_along_what_looksam_reuses(value):
    gradients = [torch.tensor([value, 1.0]), torch.tensor([2.0, 3.0])]
    add_along(gradients, [torch.ones(2), torch.ones(2)], 0.5)
    assert gradients[0].tolist()[1] == 1 and gradients[1].tolist() == [2, 3]
    add_along(gradients[1:], [torch.tensor([0.0, 1.0])], 2.0)
    assert gradients[1].tolist() == pytest.approx([2, 3 + 2 * 13**0.5])
