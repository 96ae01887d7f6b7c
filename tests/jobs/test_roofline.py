"""The bound that the benchmark's fractions are of."""

import pytest

from jobs.roofline import GPUS, Costs, Gpu, bound_s, costs
from jobs.workloads import WORKLOADS, Sizes, Workload
from nanovllm.models.model_config import parse_config
from nanovllm.models.source import resolve_model

H200 = GPUS["NVIDIA H200"]
FREE = Costs(layer_weights=0, head_weights=0, weight_bytes=0, kv_bytes=0, pair_flops=0)
UNIT = Gpu(bytes_per_s=1.0, flops_per_s=1.0)


@pytest.fixture(scope="module")
def qwen3() -> Costs:
    return costs(parse_config(resolve_model("Qwen/Qwen3-0.6B", load_format="dummy").config), 2)


@pytest.mark.parametrize(
    ("name", "cascade", "counts_input", "tok_s"),
    [
        ("nano", False, False, 35_900),
        ("many", False, False, 129_900),
        ("short", False, True, 734_000),
        ("shared", False, False, 16_900),
        ("shared", True, False, 215_600),
        ("long", False, False, 3_570),
    ],
)
def test_the_bounds_of_seed_2_on_an_h200_are_the_published_ones(
    qwen3: Costs, name: str, cascade: bool, counts_input: bool, tok_s: float
):
    load = WORKLOADS[name].build(2, Sizes())
    tokens = load.num_output_tokens + (load.num_prompt_tokens if counts_input else 0)
    assert tokens / bound_s(load, qwen3, H200, cascade=cascade) == pytest.approx(tok_s, rel=0.01)


def test_the_costs_of_the_0_6b_model_are_those_of_its_checkpoint(qwen3: Costs):
    c = parse_config(resolve_model("Qwen/Qwen3-0.6B", load_format="dummy").config)
    norms = sum(shape[0] for shape in c.tensor_shapes().values() if len(shape) == 1)
    assert qwen3.layer_weights + qwen3.head_weights == c.num_parameters - norms, "tied: one matrix for both ends"
    assert qwen3.weight_bytes == 2 * (qwen3.layer_weights + qwen3.head_weights)
    assert qwen3.kv_bytes == 2 * 28 * 8 * 128 * 2


def test_every_step_reads_the_weights_once():
    load = Workload(prompts=[[1], [1]], output_lens=[3, 5])
    weights = Costs(layer_weights=0, head_weights=0, weight_bytes=7, kv_bytes=0, pair_flops=0)
    assert bound_s(load, weights, UNIT) == 5 * 7
    assert bound_s(load, weights, UNIT, num_running=1) == 8 * 7, "one after the other"


def test_kv_is_written_once_and_read_in_every_later_step():
    load = Workload(prompts=[[1, 2, 3]], output_lens=[3])
    kv = Costs(layer_weights=0, head_weights=0, weight_bytes=0, kv_bytes=1, pair_flops=0)
    prefill, first, second = 3, 4 + 1, 5 + 1
    assert bound_s(load, kv, UNIT) == prefill + first + second


def test_a_shared_prefix_is_computed_once_and_with_cascade_read_once():
    load = Workload(prompts=[[1, 2, 3, 4], [1, 2, 3, 5]], output_lens=[2, 2], num_shared=3)
    kv = Costs(layer_weights=0, head_weights=0, weight_bytes=0, kv_bytes=1, pair_flops=0)
    prefill = 4 + 1
    assert bound_s(load, kv, UNIT) == prefill + (5 + 5) + 2
    assert bound_s(load, kv, UNIT, cascade=True) == prefill + (5 + 2) + 2


def test_a_step_costs_its_bytes_or_its_flops_whichever_take_longer():
    load = Workload(prompts=[[1]], output_lens=[1])
    model = Costs(layer_weights=1, head_weights=1, weight_bytes=2, kv_bytes=0, pair_flops=0)
    assert bound_s(load, model, UNIT) == 4.0
    assert bound_s(load, model, Gpu(bytes_per_s=0.1, flops_per_s=1.0)) == 20.0
    assert bound_s(load, FREE, UNIT) == 0.0
