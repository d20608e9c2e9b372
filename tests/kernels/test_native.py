"""Compiled operators against torch's own, which compute where there is no compiler."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import native
from kernels.attention import causal_attention, causal_attention_from
from kernels.cross_entropy import cross_entropy
from kernels.early_cross_entropy import early_cross_entropy
from kernels.expert_ffn import expert_ffn
from kernels.mla_rotation import rotate_keys, rotate_queries
from kernels.permute import permute, row_map, unpermute
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu

needs_compiler = pytest.mark.skipif(
    not native.is_there(), reason=f"nothing is compiled here: {native.why_not()}"
)
Operator = Callable[..., Tensor]


def norms(x: Tensor) -> Tensor:
    scale = torch.linspace(0.5, 2, x.shape[1], requires_grad=True)
    return rms_norm(x, scale, eps=1e-6)


def activations(x: Tensor) -> Tensor:
    return swiglu(x.repeat(1, 2) * 3, weight_T=x[:, 0].sigmoid())


def experts(x: Tensor) -> Tensor:
    size = x.shape[1]
    matrices = [torch.randn(2 * size, size) for _ in range(2)], [torch.eye(size)] * 2
    given = [matrix.requires_grad_() for group in matrices for matrix in group]
    counts = [len(x) // 3, len(x) - len(x) // 3]
    return expert_ffn(x, x[:, 0].exp(), num_tokens=counts, fc1=given[:2], fc2=given[2:])


def heads(x: Tensor) -> Tensor:
    q, k, v = (torch.stack([x * s, x.flip(1) * s])[None] for s in (1.0, -2.0, 0.5))
    return causal_attention(q, k, v[..., : max(1, x.shape[1] // 2)], scale=2 / x.shape[1])


def losses(x: Tensor) -> Tensor:
    words = torch.randn(37, x.shape[1], requires_grad=True)
    labels = torch.arange(len(x)) % 37
    labels[0] = -100
    chunk = {"weight_VD": words, "labels_T": labels, "chunk_tokens": 5}
    return cross_entropy(x, **chunk) + early_cross_entropy(x, **chunk)


def rows(x: Tensor) -> Tensor:
    chosen = (torch.arange(len(x))[:, None] + torch.arange(5)) % 3 == 0
    places = row_map(chosen, num_chosen=2, multiple=4)
    return unpermute(permute(x, places) * 1.5, places)


def rotations(x: Tensor) -> Tensor:
    size = x.shape[1]
    heads = torch.cat([x, x.flip(1), x * 2], dim=1).view(len(x), 1, 3, size)
    angles = torch.arange(len(x))[:, None] * torch.linspace(0.1, 1, 4).repeat(2)
    tables = angles.cos(), angles.sin() * 1.1  # YaRN's factor need not be alike
    pairs = torch.cat([heads, heads, heads], -1)[..., :size].repeat_interleave(2, 1)
    tail = pairs[..., :1].expand(-1, -1, -1, 8)
    queries = rotate_queries(torch.cat([pairs, tail * 3], -1), *tables)
    keys, values = rotate_keys(pairs, tail[:, :, :1], *tables, value_size=size // 2)
    return torch.cat([queries, keys, values], -1).flatten(1)


def later_heads(x: Tensor) -> Tensor:
    q, k, v = (torch.stack([x * s, x.flip(1) * s])[None] for s in (1.0, -2.0, 0.5))
    first = len(x) // 3
    seen = q[:, :, first : len(x) - first // 2]  # and keys that nobody sees
    v = v[..., : max(1, x.shape[1] // 2)]
    return causal_attention_from(seen, k, v, first=first, scale=2 / x.shape[1])


OPERATORS: list[Operator] = [
    norms,
    activations,
    experts,
    heads,
    later_heads,
    losses,
    rows,
    rotations,
]


def results(operator: Operator, *, num_rows: int, size: int) -> list[Tensor]:
    """Return output and gradient of every leaf that asks for one."""
    torch.manual_seed(num_rows * 1000 + size)
    x = torch.randn(num_rows, size, requires_grad=True)
    out = operator(x)
    leaves = sorted(_leaves(out.grad_fn), key=lambda leaf: (leaf is not x, leaf.numel()))
    weight = torch.linspace(-1, 2, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def _leaves(node: object, seen: set[object] | None = None) -> list[Tensor]:
    seen = set() if seen is None else seen
    if node is None or node in seen:
        return []
    seen.add(node)
    own = [node.variable] if hasattr(node, "variable") else []  # type: ignore[attr-defined]  torch's
    below = [leaf for child, _ in node.next_functions for leaf in _leaves(child, seen)]  # type: ignore[attr-defined]  torch's
    return own + below


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(native, "is_there", lambda: False)


@needs_compiler
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize(
    ("num_rows", "size"), [(1, 2), (2, 3), (33, 1), (65, 48), (130, 257)], ids=str
)
def test_both_ways_agree(
    operator: Operator, num_rows: int, size: int, plain: Callable[[], None]
) -> None:
    compiled = results(operator, num_rows=num_rows, size=size)
    plain()
    for found, expected in zip(
        compiled, results(operator, num_rows=num_rows, size=size), strict=True
    ):
        # sums in another order, exp within 2 ulp
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6 * largest)


@needs_compiler
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_the_number_of_threads_changes_no_bit(operator: Operator) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = results(operator, num_rows=130, size=256)
            found.append(out)
    finally:
        torch.set_num_threads(before)
    products = (losses,) if native.blas_product() else (experts, losses)
    if operator not in products:  # no matrix product of torch's in them
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    else:
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(
                one, two, rtol=1e-5, atol=1e-5 * float(one.detach().abs().max())
            )


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_what_is_no_number_is_not_lost(
    operator: Operator, bad: float, plain: Callable[[], None]
) -> None:
    def spoilt(x: Tensor) -> Tensor:
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[1, 0] = True
        return operator(x.masked_fill(mask, bad))

    compiled = results(spoilt, num_rows=70, size=6)[0]
    plain()
    expected = results(spoilt, num_rows=70, size=6)[0]
    if operator in (heads, later_heads):  # a weight of 0 for a later key lets it through, in each
        assert not compiled[0, 0, 1].isfinite().all()
    else:
        assert torch.equal(compiled.isfinite(), expected.isfinite())
    assert not compiled.isfinite().all()


@needs_compiler
def test_exponentials_are_within_two_steps_of_fp32() -> None:
    scores = torch.linspace(-87, 0, 4_000_001).view(1, 1, -1)  # the largest is 0
    exact = scores.double().exp()
    out, total = scores[0].clone(), torch.empty(1)
    native.call("exp_rows", out, torch.zeros(1), total, *out.shape)
    step = torch.exp2(exact.log2().floor() - 23)
    assert float(((out - exact[0]).abs() / step).max()) <= 2
    assert float(total) == pytest.approx(float(exact.sum()), rel=1e-5)


@needs_compiler
def test_large_and_small_activations_saturate() -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -88.0, 0.0, 88.0, 90.0, 200.0, 1e30])
    hidden = torch.stack([gate, torch.ones_like(gate)], -1)
    out = torch.empty(len(gate), 1)
    native.call("swiglu", hidden, None, out, len(gate), 1)
    expected = gate.double() * gate.double().sigmoid()
    torch.testing.assert_close(out[:, 0].double(), expected, rtol=1e-6, atol=1e-8)


@needs_compiler
def test_measures_add_up_and_keep_the_largest() -> None:
    sums, largest = torch.zeros(2), torch.full((), float("-inf"))
    parts = [torch.randn(3, 4097), torch.full((5,), -9.0), torch.zeros(1), torch.empty(0)]
    for part in parts:
        native.call("measure", part, sums, largest, part.numel())
    values = torch.cat([part.flatten() for part in parts]).double()
    assert sums.tolist() == pytest.approx([float(values.square().sum()), len(values)], rel=1e-6)
    assert float(largest) == 9.0
    for bad in (float("nan"), 1e30):  # once lost, for ever
        native.call("measure", torch.tensor([1.0, bad]), sums, largest, 2)
        assert largest.isnan()
    infinite = torch.zeros(())
    native.call("measure", torch.tensor([float("-inf")]), sums, infinite, 1)
    assert float(infinite) == float("inf")


@needs_compiler
def test_scores_of_any_size_make_weights() -> None:
    """Rows whose sum is far from 1, and rows in which one key takes all."""
    q = torch.randn(2, 3, 100, 16) * torch.logspace(-3, 3, 100)[:, None]
    k, v = torch.randn(2, 3, 100, 16), torch.ones(2, 3, 100, 4)
    out = causal_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, v, rtol=1e-5, atol=0)


@needs_compiler
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 4).bfloat16(), torch.zeros(4, 8)[:, ::2], torch.zeros(4, 4, device="meta")],
    ids=["bf16", "strided", "meta"],
)
def test_what_the_compiled_code_cannot_read_is_refused(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match=r"dense torch\.float32 on cpu is allowed"):
        native.call("measure", tensor, torch.zeros(2), torch.zeros(()), 16)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )


SAYS = "from kernels import native; print(native.is_there(), native.why_not(), native.version())"


@pytest.fixture
def compilers(tmp_path: Path) -> Path:
    """A folder for programs, the only one of the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def test_without_a_compiler_torch_computes_and_the_reason_is_told(
    tmp_path: Path, compilers: Path
) -> None:
    told = run(SAYS, PATH=str(compilers), XDG_CACHE_HOME=str(tmp_path), CC="")
    assert told.stdout.startswith("False no C compiler found"), told
    assert told.stdout.rstrip().endswith(" torch")


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path, compilers: Path) -> None:
    broken = compilers / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no room >&2; exit 1\n")
    broken.chmod(0o755)
    told = run(SAYS, PATH=f"{compilers}:/bin", XDG_CACHE_HOME=str(tmp_path), CC=str(broken))
    assert told.stdout.startswith("False "), told
    assert "no room" in told.stdout
    assert not list((tmp_path / "pretrain").iterdir())


def test_the_switch_leaves_the_compiler_out() -> None:
    assert run(SAYS, PRETRAIN_NATIVE="0").stdout.startswith("False PRETRAIN_NATIVE=0")


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAYS],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.communicate()[0].startswith("True")
    (library,) = folder.iterdir()
    made = library.stat().st_mtime_ns
    assert run(SAYS, XDG_CACHE_HOME=str(tmp_path)).stdout.startswith("True")
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [made]
