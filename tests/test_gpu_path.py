"""What a GPU run does differently, as far as a CPU shows it: devices, collectives, the engine's arguments, shapes."""

import ast
import json
import os
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import finish
from forked import Forked, finish_together
from test_update import attached, close, gradient
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import prerl_lightning
from prerl_lightning.budget import ModelShape
from prerl_lightning.errors import InputError
from prerl_lightning.metrics.alignment import GradientComparison
from prerl_lightning.objectives import GRPO, MixedRL, NSRPreRL, Objective
from prerl_lightning.objectives.surrogates import GSPO
from prerl_lightning.objectives.term import Term
from prerl_lightning.objectives.token_weights import Confidence
from prerl_lightning.policy import attention, packing
from prerl_lightning.policy.attention import Segment, VarlenPlan, plan_attention
from prerl_lightning.policy.model import Policy, load_config, model_path
from prerl_lightning.policy.packing import families, micro_batches
from prerl_lightning.rollout.engine import Place, Sampling
from prerl_lightning.rollout.host import ranks_in_environment, state_kept
from prerl_lightning.rollout.vllm_engine import VLLMEngine
from prerl_lightning.strategies import FSDP2Strategy
from prerl_lightning.types import Sequences

PACKAGE = Path(prerl_lightning.__file__).parent

# ---------------------------------------------------------------------- loading


def test_a_model_loads_on_the_cpu_whatever_the_default_device(model_folder, caplog):
    """Lightning's `configure_model` has the rank's GPU as default device around it."""
    folder = model_folder("qwen3-untied")
    with torch.device("cuda:0"), caplog.at_level("INFO"):
        policy = Policy.from_pretrained(folder)
    assert {p.device.type for p in policy.parameters()} == {"cpu"}
    assert policy.can_pack
    assert policy.can_share
    assert not caplog.records
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it makes a plan for every new shape


# ---------------------------------------------------------------------- collectives

NCCL_ALONE = """
import torch, torch.distributed as dist
dist.init_process_group("cuda:gloo", init_method="tcp://127.0.0.1:{port}", rank=0, world_size=1)
try:
    dist.all_reduce(torch.ones(1))
except RuntimeError as error:
    assert "No backend type associated with device type cpu" in str(error)
else:
    raise AssertionError("this group was to have no CPU backend")

from prerl_lightning import ranks
from prerl_lightning.metrics.held_out import EvaluationMetric
from prerl_lightning.metrics.sums import Sums
from prerl_lightning.metrics.thoughts import ThoughtCounts
from test_evaluation import groups

metric = EvaluationMetric()
metric.update(groups(range(6)), groups(range(6), 1), 4)
assert metric.compute()["avg@4"] > 0
metric.reset()
counts = ThoughtCounts(["wait"])
counts.update(torch.tensor([[2]]), torch.tensor([5]), torch.tensor([1.0]))
assert counts.compute()["wait"] == 2
assert ranks.gather([1]) == [1]
assert ranks.all_reduce(torch.tensor(3)) == 3
sums = Sums(torch.device("cpu"))
sums.add("optim/loss", 2.0)
assert sums.reduced()["optim/loss"] == 2
"""


def test_a_group_without_a_cpu_backend(free_port):
    """vLLM makes one, NCCL's, even on a single GPU."""
    finish(Forked(["-c", NCCL_ALONE.format(port=free_port)]))


TWO_RANKS = """
import sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
from prerl_lightning import ranks

assert ranks.collective_device().type == "cpu"
ranks.collective_device = lambda: torch.device("cpu", 0)  # another one than that of the tensors
assert ranks.all_reduce(torch.tensor([1.0 + rank])).tolist() == [3.0]
assert ranks.gather([rank, "x"]) == [0, "x", 1, "x"]
states = ranks.gather_state(torch.arange(rank + 1))
assert [s.tolist() for s in states] == [[0], [0, 1]]
"""


def test_collectives_of_two_ranks(free_port):
    finish_together([Forked(["-c", TWO_RANKS.format(port=free_port), rank]) for rank in range(2)])


def test_where_the_group_s_tensors_lie(monkeypatch):
    from prerl_lightning import ranks

    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    for backends, device in (("cuda:nccl", "cuda:3"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo", "cpu")):
        monkeypatch.setattr("torch.distributed.get_backend_config", lambda b=backends: b)
        assert ranks.collective_device() == torch.device(device)


def test_all_collectives_are_in_one_place():
    """ranks.py knows where tensors have to lie. Elsewhere torch.distributed is asked for names of types alone."""
    allowed = {"ReduceOp", "tensor", "fsdp", "is_initialized"}
    for file in PACKAGE.rglob("*.py"):
        if file.name in ("ranks.py", "ranks_worker.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dist":
                assert node.attr in allowed, (file, node.lineno)
            if isinstance(node, ast.Attribute) and node.attr in ("all_gather", "all_reduce"):
                assert ast.unparse(node).startswith("ranks."), (file, node.lineno)


# ---------------------------------------------------------------------- the engine


class Recorder:
    """Stands for vllm.LLM on a GPU."""

    device = "cuda:0"

    def __init__(self, model, **options):
        self.options = options
        self.environment = {k: os.environ.get(k) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
        self.calls = []
        cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
        sizes = SimpleNamespace(dtype=torch.bfloat16, max_model_len=options["max_model_len"])
        scheduler = SimpleNamespace(max_num_seqs=options.get("max_num_seqs", 1024))
        config = SimpleNamespace(cache_config=cache, model_config=sizes, scheduler_config=scheduler)
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def collective_rpc(self, function, args=()):
        if args:
            self.calls.append(("update", {name: t.dtype for name, t in args[0]}))
            return [[]]
        return [self.device]

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def wake_up(self, tags=("weights", "kv_cache")):
        self.calls.append(("wake", *tags))

    def reset_prefix_cache(self):
        self.calls.append(("reset",))
        return True


@pytest.fixture
def on_gpu(monkeypatch):
    """A function that starts an engine as if vLLM ran on GPUs."""
    import vllm
    from vllm.platforms import current_platform

    if (real := VLLMEngine._running()) is not None:  # of another file's tests: it ends on the CPU that it began on
        real.stop()
    monkeypatch.setattr(vllm, "LLM", Recorder)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)

    def start(place, seen=None, **options):
        monkeypatch.setattr(Recorder, "device", seen or str(place.device))
        engine = VLLMEngine(**options)
        engine.start(model_path("embedded-sums"), 7, place)
        return engine

    return start


def test_autocast_of_the_training_step_ends_where_the_engine_begins():
    """On a GPU an engine in fp32 would compute in bf16: its linear layers are torch's."""
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cuda", dtype=torch.bfloat16):
        with state_kept():
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cpu")


def test_an_engine_that_sleeps_is_woken_before_it_ends(on_gpu):
    """vLLM's allocator unmaps what sleeps a second time else, and gives the next engine of the process no memory."""
    engine = on_gpu(Place(device=torch.device("cuda", 0)), max_model_len=40)
    ended = SimpleNamespace(shutdown=lambda: llm.calls.append(("shutdown",)))
    (llm := engine._llm).llm_engine.engine_core = ended
    engine.sleep()
    engine.stop()
    assert llm.calls == [("sleep", 2), ("wake", "weights", "kv_cache"), ("shutdown",)]


def test_a_gpu_engine_gets_vllm_s_own_defaults(on_gpu, caplog):
    with caplog.at_level("INFO"):
        engine = on_gpu(Place(device=torch.device("cuda", 0)), max_model_len=40)
    options = engine._llm.options
    assert "kv_cache_memory_bytes" not in options  # what gpu_memory_utilization leaves
    assert "max_num_seqs" not in options
    assert "enable_chunked_prefill" not in options
    assert "distributed_executor_backend" not in options
    assert options["gpu_memory_utilization"] == 0.5
    assert options["enforce_eager"] is False
    assert options["enable_sleep_mode"] is True
    with caplog.at_level("INFO"):
        engine._say_room(600)
    assert "room for 1600 tokens: 40.0 sequences of the greatest length, 40. It would decode 600 at" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"


def test_room_is_measured_by_the_responses_that_are_wanted(on_gpu, caplog):
    with caplog.at_level("INFO"):
        on_gpu(Place(device=torch.device("cuda", 0)), max_model_len=40)._say_room(128)  # and not by vLLM's 1,024
    assert caplog.records[-1].getMessage().endswith("40.0 sequences of the greatest length, 40.")
    assert caplog.records[-1].levelname == "INFO"


def test_the_order_of_sleep_update_and_wake(on_gpu, model_folder):
    engine = on_gpu(Place(device=torch.device("cuda", 0)), max_model_len=40)
    policy = Policy.from_pretrained(model_folder("llama-tied"))
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate([[1]], Sampling(), [1])
    engine.update_weights(policy.named_weights(engine.weights_dtype), 3)
    names = [call[0] for call in engine._llm.calls]
    assert names == ["sleep", "wake", "update", "wake", "reset"]
    assert engine._llm.calls[0] == ("sleep", 2)
    assert engine._llm.calls[1] == ("wake", "weights")
    assert set(engine._llm.calls[2][1].values()) == {torch.bfloat16}  # the engine's, not fp32
    assert engine._llm.calls[3] == ("wake", "kv_cache")
    assert engine.policy_version == 3


def test_the_engine_is_told_the_rank_s_device(on_gpu):
    """SLURM sets SLURM_LOCALID and no LOCAL_RANK; --trainer.devices [4,5] makes rank 1's device 5."""
    place = Place(rank=1, world_size=2, local_rank=1, device=torch.device("cuda", 5))
    llm = on_gpu(place, max_model_len=40)._llm
    assert llm.environment == {"RANK": "1", "LOCAL_RANK": "5", "WORLD_SIZE": "2", "MASTER_PORT": None}
    assert llm.options["distributed_executor_backend"] == "external_launcher"
    alone = on_gpu(Place(device=torch.device("cuda", 4)), max_model_len=40)._llm
    assert {k: alone.environment[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "0",
        "LOCAL_RANK": "4",
        "WORLD_SIZE": "1",
    }
    assert int(alone.environment["MASTER_PORT"]) > 0
    assert alone.options["distributed_executor_backend"] == "external_launcher"
    assert "LOCAL_RANK" not in os.environ
    with pytest.raises(InputError, match=r"started on cuda:0, this rank trains on cuda:5"):
        on_gpu(place, seen="cuda:0", max_model_len=40)


def test_slurm_s_local_rank_reaches_the_engine(monkeypatch):
    """Nothing but SLURM_LOCALID, through Lightning's strategy and the DataModule's set-up."""
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    from prerl_lightning.data.module import RolloutDataModule
    from prerl_lightning.data.tasks.sums import ArithmeticProblems
    from prerl_lightning.rewards import arithmetic_reward

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setenv("SLURM_PROCID", "3")
    gpus = [torch.device("cuda", i) for i in range(4)]
    strategy = DDPStrategy(parallel_devices=gpus, cluster_environment=SLURMEnvironment())
    places = []
    engine = VLLMEngine(max_model_len=64)
    monkeypatch.setattr(engine, "start", lambda model, seed, place: places.append(place))
    data = RolloutDataModule(ArithmeticProblems("train", 64), reward=arithmetic_reward, engine=engine)
    data.sampling = Sampling(max_new_tokens=16)
    hooks = ("check_run", "check_prefixes", "plan_memory", "configure_model")
    module = SimpleNamespace(model_name="embedded-sums", **dict.fromkeys(hooks, lambda *args: None))
    ranks = {"world_size": 4, "global_rank": 3, "num_devices": 4, "num_nodes": 1, "limit_train_batches": 1.0}
    data.trainer = SimpleNamespace(strategy=strategy, lightning_module=module, **ranks)
    try:
        data.setup("fit")
    finally:
        data.teardown("fit")
    assert places[0].device == torch.device("cuda", 3)
    with ranks_in_environment(places[0]):
        assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.parametrize("key", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_an_engine_over_several_gpus_is_refused(key):
    with pytest.raises(InputError, match="other prompts"):
        VLLMEngine(extra={key: 2}).start("embedded", 0, Place())


def test_a_cache_without_room_for_one_sequence_is_refused_before_the_start(monkeypatch):
    monkeypatch.setattr("vllm.LLM", None)
    with pytest.raises(InputError, match=r"kv_cache_mib: 1 MiB hold 256 tokens of this model.* max_model_len \(2000\)"):
        VLLMEngine(kv_cache_mib=1, max_model_len=2000).start(
            model_path("embedded-sums"), 0, Place(device=torch.device("cpu"))
        )
    config = load_config("embedded-sums")
    sizes = VLLMEngine(max_model_len=100_000).sizes(ModelShape.of_config(config), config, None)
    assert sizes.kv_cache >= 100_000 * 4096
    assert sizes.kv_tokens >= 100_000


def test_what_is_offloaded_is_reduced_on_the_cpu_and_computed_on_the_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    strategy = FSDP2Strategy(cpu_offload=True)
    strategy.parallel_devices = [torch.device("cuda", 0)]
    assert strategy.process_group_backend == "cuda:nccl,cpu:gloo"
    assert (strategy.home, strategy.root_device) == (torch.device("cpu"), torch.device("cuda", 0))
    strategy.model_to_device()  # leaves the weights where they are
    policy = Policy.from_pretrained("embedded")
    policy.compute_device = strategy.root_device
    module = GRPO(model="embedded")
    module.policy = policy
    assert module.compute_device == policy.device == torch.device("cuda", 0)
    assert GradientComparison(policy).device == torch.device("cuda", 0)
    assert {p.device.type for p in policy.parameters()} == {"cpu"}


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true"])
def test_precisions_that_sharding_does_not_know_are_refused(precision):
    with pytest.raises(InputError, match=f"fsdp2 takes one of 32-true, bf16-mixed, not {precision}"):
        FSDP2Strategy().setup(SimpleNamespace(precision=precision))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "No available memory for the\ncache blocks.",
            r"no room here: No available memory for the cache blocks\. What h",
        ),
        ("Free memory is less. Decrease GPU memory utilization.", r"Decrease GPU memory utilization\.$"),
    ],
)
def test_what_vllm_says_of_memory_is_said_in_one_line(on_gpu, monkeypatch, said, words):
    import vllm

    def full(*args, **kwargs):
        raise ValueError(said)

    monkeypatch.setattr(vllm, "LLM", full)
    with pytest.raises(InputError, match=words):
        VLLMEngine(max_model_len=40).start(model_path("embedded-sums"), 0, Place(device=torch.device("cuda", 0)))


def test_memory_is_reckoned_once_for_an_engine_that_is_there(on_gpu):
    """Of a second fit in one process: what it has taken is not free any more, unless it sleeps."""
    shape = SimpleNamespace(parameters=10**9)
    engine = on_gpu(Place(device=torch.device("cuda", 0)), max_model_len=40)
    assert engine.device_bytes(shape, 80) == (0, 0)
    engine.sleep()
    assert engine.device_bytes(shape, 80) == (40, 0)
    VLLMEngine().sleep()  # before its start, nothing happens


# ---------------------------------------------------------------------- attention


def reference_varlen(
    query, key, value, bounds, key_bounds, longest_q, longest_k, *, scale, window_size, enable_gqa=False
):
    """torch.nn.attention.varlen in plain words: each segment alone, causal from the lower right."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    out = []
    for i in range(len(bounds) - 1):
        q = query[bounds[i] : bounds[i + 1]]
        k, v = (x[key_bounds[i] : key_bounds[i + 1]] for x in (key, value))
        assert 0 < len(q) <= longest_q
        assert 0 < len(k) <= longest_k
        k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


@contextmanager
def varlen_on_cpu(monkeypatch):
    """Packs planned for the kernel, which is replaced by the plain words above."""
    with monkeypatch.context() as patched:
        patched.setattr(attention.varlen, "varlen_attn", reference_varlen)
        patched.setattr(Policy, "attention_kernel", lambda self, device: "varlen")
        attention._varlen_options.cache_clear()
        yield
    attention._varlen_options.cache_clear()


@pytest.mark.parametrize("objective", [GRPO, NSRPreRL, MixedRL])
@pytest.mark.parametrize("shape", ["llama-tied", "qwen3-untied"])
def test_both_kinds_of_plans_give_what_sequences_give_alone(model_folder, make_rollout, monkeypatch, objective, shape):
    monkeypatch.setattr(packing, "SHARE_MIN_TOKENS", 1)
    rollout, folder = make_rollout(6, 4), model_folder(shape)
    alone = gradient(attached(objective, folder, packing=False, micro_batch_size=1), rollout)
    close(gradient(attached(objective, folder), rollout), alone)
    with varlen_on_cpu(monkeypatch):
        for options in ({}, {"share_prompts": False}, {"gradient_checkpointing": True}):
            close(gradient(attached(objective, folder, **options), rollout), alone)


def test_the_kernel_is_called_once_a_pack_without_masks_or_padding(monkeypatch):
    root = Segment(0, 5)
    plan = plan_attention(
        [root, Segment(5, 3, root), Segment(8, 700), Segment(708, 2, root), Segment(710, 1)], "varlen"
    )
    assert isinstance(plan, VarlenPlan)
    assert plan.bounds.tolist() == [0, 5, 8, 708, 710, 711]
    assert plan.key_bounds.tolist() == [0, 5, 13, 713, 720, 721]
    assert plan.keys.tolist() == [*range(5), *range(8), *range(8, 708), *range(5), 708, 709, 710]
    assert plan.longest == (700, 700)
    assert plan.bounds.dtype == plan.key_bounds.dtype == torch.int32
    assert plan_attention([Segment(0, 4), Segment(4, 9)], "varlen").keys is None
    calls = []
    monkeypatch.setattr(attention.varlen, "varlen_attn", lambda q, *args, **kwargs: calls.append(args) or q)
    q, k = torch.zeros(711, 4, 8), torch.zeros(711, 2, 8)
    plan.attend(q, k, k, None)
    assert len(calls) == 1
    assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in calls[0])


def test_a_mask_never_comes_with_fewer_heads_of_keys(model_folder, make_rollout, monkeypatch):
    """CUDA has no fused kernel for both."""
    monkeypatch.setattr(packing, "SHARE_MIN_TOKENS", 1)
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, enable_gqa=False, **kwargs):
        seen.append((attn_mask is not None, enable_gqa or q.shape[1] != k.shape[1]))
        return plain(q, k, v, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    module = attached(GRPO, model_folder("llama-tied"))
    seen.clear()
    gradient(module, make_rollout(6, 4))
    assert (True, False) in seen
    assert (False, True) in seen
    assert (True, True) not in seen


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "takes"),
    [
        ("cuda", torch.bfloat16, False, True),
        ("cuda", torch.float32, False, False),
        ("cuda", torch.bfloat16, True, False),
        ("cpu", torch.float32, False, True),
    ],
)
def test_which_fused_kernels_take_fewer_heads_of_keys(device, dtype, masked, takes):
    """In fp32 torch would choose its math kernel on a GPU, which keeps (S, H, width, width)."""
    assert attention.takes_groups(device, dtype, torch.ones(1) if masked else None) == takes


def test_the_train_step_s_benchmark_runs(tmp_path):
    """benchmarks/gpu.sh has it measured where a GPU is lent for minutes."""
    script = Path(__file__).parents[1] / "benchmarks" / "train_step.py"
    args = [script, "--shape=tiny", "--responses=8", "--tokens=20", "--repeats=1", f"--out={tmp_path / 'found.json'}"]
    finish(Forked(args))
    assert json.loads((tmp_path / "found.json").read_text())["tiny"]["tokens_per_second"] > 0


def test_the_kernel_is_taken_only_in_16_bits_on_a_gpu_that_was_seen_to_run_it(model_folder, monkeypatch, caplog):
    policy = Policy.from_pretrained(model_folder("qwen3-untied"))
    assert policy.head_shapes == {(2, 1, 32, 32)}
    gpu, tried = torch.device("cuda", 0), []
    assert policy.attention_kernel(torch.device("cpu")) == "sdpa"
    assert policy.attention_kernel(gpu) == "sdpa"  # fp32
    monkeypatch.setattr("torch.is_autocast_enabled", lambda device: True)
    monkeypatch.setattr("torch.get_autocast_dtype", lambda device: torch.bfloat16)
    for works in (True, False):
        monkeypatch.setattr(attention, "varlen_works", lambda *args, w=works: tried.append(args) or w)
        assert policy.attention_kernel(gpu) == ("varlen" if works else "sdpa")
    assert tried[0] == (gpu, torch.bfloat16, 2, 1, 32, 32)


def test_a_kernel_that_differs_or_raises_is_not_taken(monkeypatch, caplog):
    """`varlen_works` itself, on the CPU: torch's kernel raises there; right and wrong ones stand for a GPU's."""
    cpu = torch.device("cpu")

    def works(dtype):
        attention.varlen_works.cache_clear()
        attention._varlen_options.cache_clear()
        return attention.varlen_works(cpu, dtype, 4, 2, 32, 32)

    with caplog.at_level("INFO"):
        assert not works(torch.bfloat16)
        assert "which costs time: no variable-length kernel" in caplog.text
        monkeypatch.setattr(attention.varlen, "varlen_attn", reference_varlen)
        assert works(torch.bfloat16)
        assert "Flash Attention's variable-length kernel" in caplog.text

        @wraps(reference_varlen)
        def off(*args, **kwargs):
            return reference_varlen(*args, **kwargs) * 1.05

        monkeypatch.setattr(attention.varlen, "varlen_attn", off)
        assert not works(torch.float32)
        assert "its results differ" in caplog.text
    attention.varlen_works.cache_clear()
    attention._varlen_options.cache_clear()


# ---------------------------------------------------------------------- shapes and memory


def fake(mode, module, made=None):
    """``module`` with fake tensors for its weights, each once."""
    made = {} if made is None else made
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        copy = mode.from_tensor(tensor.detach())
                        made[id(tensor)] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
                    store[name] = made[id(tensor)]


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"entropy": True},
        {"importance_sampling": "sequence-mask", "epochs": 2},
        {
            "terms": [Term("post-train", surrogate=GSPO(), weight=Confidence())],
            **{"entropy_coefficient": 0.1, "epochs": 2},
        },
    ],
)
def test_no_shape_in_a_pass_depends_on_values(model_folder, make_rollout, monkeypatch, kernel, options):
    """A GPU would be waited for there. Fake tensors have shapes and no values, and raise."""
    monkeypatch.setattr(packing, "SHARE_MIN_TOKENS", 1)
    monkeypatch.setattr(Policy, "attention_kernel", lambda self, device: kernel)
    if kernel == "varlen":
        monkeypatch.setattr(attention.varlen, "varlen_attn", lambda q, k, v, *args, **kwargs: q * (k.sum() + v.sum()))
    module = attached(Objective if "terms" in options else GRPO, model_folder("qwen3-untied"), **options)
    update = module.make_update(make_rollout(6, 4))
    (work,) = [update.work(term) for term in module.terms]
    batches = update.passes.micro_batches("post-train", work.own)
    assert any(b.plan is not None for b in batches)
    monkeypatch.setattr(update, "_count_work", lambda batch: None)  # on the host, of the batch as it was made
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake(mode, module.policy)
        update.sums.totals = mode.from_tensor(update.sums.totals)
        update.passes.engine_log_probs = mode.from_tensor(update.passes.engine_log_probs)
        for batch in batches:
            update.loss_of(batch, work, 10.0, 1.0, on_policy=True).backward()
    assert all(p.grad is not None for p in module.policy.parameters())


def test_a_step_leaves_no_gradients_behind(model_folder, make_rollout):
    """They would take as much memory as the weights, all through the next rollout."""
    module = attached(GRPO, model_folder("llama-tied"))
    before = [p.detach().clone() for p in module.policy.parameters()]
    module.make_update(make_rollout()).run(module.make_optimizer(), [1e-3])
    assert all(p.grad is None for p in module.policy.parameters())
    assert not all(torch.equal(p, b) for p, b in zip(module.policy.parameters(), before, strict=True))


def test_distinct_shapes_of_a_step(make_rollout):
    """Each is a kernel's new shape: with the variable-length kernel one call a pack, with padded calls tens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 2000, (64,), generator=generator).tolist()
    responses = Sequences.of([[5] * n for n in lengths])
    made = families(Sequences.of([[1] * 150]), [0] * 64, responses, range(64), True, 8192)
    padded = micro_batches(made, responses, 8192)
    varlen = micro_batches(made, responses, 8192, kernel="varlen")
    shapes = {(c.rows, c.width) for b in padded for c in b.plan.calls}
    assert len(shapes) > 2 * len(varlen)
    assert sum(len(b.plan.bounds) - 1 for b in varlen) == 64 + sum(f.shared for f in made)


def test_each_life_has_its_own_packs_and_the_host_s_where_it_says_nothing(model_folder, make_rollout):
    host, successor = attached(GRPO, model_folder("llama-tied")), GRPO(max_tokens_per_microbatch=33)
    host._pack_tokens, host._trainer = 77, SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    for module, tokens in ((host, 77), (successor, 33), (GRPO(), 77)):
        if module is not host:
            host.hand_over(module)
        assert module.make_passes(make_rollout()).max_tokens == tokens


@pytest.mark.parametrize(("free", "tokens", "recomputed"), [(79, 16384, False), (40, 11264, False), (16, 16384, True)])
def test_packs_follow_the_memory_that_is_free(monkeypatch, tmp_path, free, tokens, recomputed, caplog):
    """Qwen3-0.6B's shape on GPUs of several sizes, before anything is loaded: only its config.json is there."""
    from transformers import Qwen3Config

    sizes = {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    config = Qwen3Config(num_attention_heads=16, num_key_value_heads=8, vocab_size=151936, **sizes)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free * 2**30, 80 * 2**30))
    module = GRPO(model=str(tmp_path))
    module._trainer = SimpleNamespace(strategy=None, world_size=1, precision="bf16-mixed", callbacks=[])
    engine = VLLMEngine(max_model_len=1024, gpu_memory_utilization=0.05)
    with caplog.at_level("INFO"):
        module.plan_memory(engine, torch.device("cuda", 0), 1024)
    assert module.gradient_checkpointing == recomputed
    assert module.pack_tokens <= tokens
    assert module.pack_tokens > tokens // 4
    assert f"packs of {module.pack_tokens} tokens" in caplog.text
    module.plan_memory(engine, torch.device("cpu"), 1024)  # there is nothing to plan
    if free == 16:
        engine = VLLMEngine(max_model_len=1024, gpu_memory_utilization=0.9)
        with pytest.raises(InputError, match="GPU memory: a rollout"):
            module.plan_memory(engine, torch.device("cuda", 0), 1024)


@pytest.mark.parametrize(("prompt", "answer", "group"), [(159, 21, 8), (1500, 20, 16), (100, 900, 4)])
def test_packs_hold_no_more_keys_than_memory_was_reckoned_with(prompt, answer, group):
    """Each response has its own copy of a shared prompt's keys and values."""
    n = 4 * group
    responses, contexts = Sequences.of([[5] * answer] * n), Sequences.of([[1] * prompt] * 4)
    context_of = [i // group for i in range(n)]
    made = families(contexts, context_of, responses, range(n), True, 2048, 4096)
    batches = micro_batches(made, responses, 2048, kernel="varlen", max_keys=4096)
    assert all(b.plan.key_bounds[-1] <= 4096 for b in batches)
    assert sorted(torch.cat([b.source for b in batches]).tolist()) == list(range(n * answer))
    free = micro_batches(
        families(contexts, context_of, responses, range(n), True, 2048), responses, 2048, kernel="varlen"
    )
    assert len(free) <= len(batches)
