"""The shape of the house: who imports whom, how long files are, and what must not be said in them."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "rollout", "grpo")
STANDARD = set(sys.stdlib_module_names)
ALLOWED = {
    "kernels": {"torch", "triton"},
    "rollout": {"torch", "numpy", "einops", "safetensors", "tokenizers", "jinja2", "gguf", "huggingface_hub"},
    "grpo": {"torch", "numpy", "einops", "safetensors", "matplotlib"},
}
ARROWS = {"kernels": set(), "rollout": {"kernels"}, "grpo": {"rollout"}}
TORCH_ALONE = ("grpo/loss.py", "grpo/advantages.py")
LONG = {
    "grpo/loss.py": 780,  # every published loss, in a file that works when copied out
}
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
name = lambda path: str(path.relative_to(ROOT))


def imports(path):
    """(level, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_run_one_way(path):
    folder = path.parent.name
    for level, module in imports(path):
        top = module.split(".")[0]
        if level == 0:
            assert top in STANDARD | ALLOWED[folder], f"{name(path)} imports {module}"
        elif level == 2:
            assert top in ARROWS[folder], f"{name(path)} reaches ..{module}"
        else:
            assert level == 1
    if name(path) in TORCH_ALONE:
        assert {module for level, module in imports(path) if level or module not in STANDARD} == {"torch"}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_stay_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONG.get(name(path), 400), f"{name(path)} has {lines} lines: is there a seam?"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "_runtime.py"], ids=name)
def test_only_the_runtime_reads_the_environment(path):
    assert not {"os.environ", "os.getenv"} & {ast.unparse(n) for n in ast.walk(ast.parse(path.read_text()))}


def test_the_readme_names_every_file():
    house = (ROOT / "README.md").read_text().split("## The house")[1].split("```")[1]
    sections = dict(
        zip(FOLDERS, re.split(r"^(?:rollout|grpo|benchmarks)/", house, flags=re.MULTILINE), strict=False)
    )
    for folder, section in sections.items():
        files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert set(re.findall(r"\b[A-Za-z_0-9]+\.py\b", section)) == files, folder


PUBLIC = {
    "kernels": {
        "fused_linear_logprob": "hidden weight target_ids * bias temperature softcap mask return_entropy",
        "quantize_4bit": "weight format block_size double_quant",
        "dequantize_4bit": "q dtype",
        "QuantizedWeight.from_bitsandbytes": "state_dict prefix",
        "QuantizedWeight.to": "self device",
        "matmul_4bit": "x q bias",
        "lora_linear": "x weight lora_a lora_b scaling bias",
        "paged_attention": "q",
    },
    "rollout": {
        "Policy.load": "name_or_path * quantize lora device dtype",
        "Policy.score": "self input_ids completion_mask",
        "Policy.disable_adapters": "self",
        "Policy.save_adapter": "self folder",
        "LoraConfig": "r alpha targets",
        "Sampler": "policy * max_batch kv_memory",
        "Sampler.generate": "self prompts params * group_size",
        "SamplingParams": "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty stop "
        "stop_token_ids logit_bias ignore_eos seed",
        "Completion": "token_ids logprobs finish_reason text",
    },
    "grpo": {
        "group_advantages": "rewards group_ids estimator eps",
        "policy_loss": "logprobs old_logprobs advantages mask config * ref_logprobs sampler_logprobs "
        "entropy denominator",
        "LossConfig": "ratio_level surrogate clip_low clip_high dual_clip * kl_coef kl_estimator kl_gradient "
        "aggregate max_completion_length",
        "LossOutput": "loss",
        "preset": "name",
        "kl_penalty": "logprobs ref_logprobs",
        "GRPOConfig": "",
        "GRPOTrainer": "config",
        "RolloutBatch.load": "path",
        "RolloutBatch.save": "self path",
    },
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_public_names_and_their_parameters(folder):
    """What a caller may rely on: positional arguments keep their places, those after * their names."""
    package = importlib.import_module(f"nanogrpo.{folder}")
    assert {path.split(".")[0] for path in PUBLIC[folder]} <= set(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
    for path, expected in PUBLIC[folder].items():
        names = list(inspect.signature(attrgetter(path)(package)).parameters)
        positional, _, by_name = expected.partition("*")
        positional = positional.split()
        assert names[: len(positional)] == positional, path
        assert set(by_name.split()) <= set(names), path


def run(code, *, cwd):
    return subprocess.run([sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else
                          [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)  # fmt: skip


def test_the_package_shadows_no_other(tmp_path):
    """Installed, our folders are found under nanogrpo alone: Hugging Face has a package called `kernels`."""
    code = (
        "import importlib.util as u, nanogrpo.kernels; "
        "print([n for n in ('kernels', 'rollout', 'grpo') if u.find_spec(n)])"
    )
    assert run(code, cwd=tmp_path).stdout.strip() == "[]"


def test_loss_and_advantages_run_as_copied_files(tmp_path):
    for source in TORCH_ALONE:
        (tmp_path / Path(source).name).write_text((ROOT / source).read_text())
    code = "import sys; sys.path.insert(0, '.'); import loss, advantages; print(loss.preset('grpo').name)"
    assert run(code, cwd=tmp_path).stdout.strip() == "grpo"


def test_kernels_run_as_a_copied_folder(tmp_path):
    target = tmp_path / "vendored"
    target.mkdir()
    for path in (ROOT / "kernels").glob("*.py"):
        (target / path.name).write_text(path.read_text())
    code = (
        "import sys; sys.path.insert(0, '.'); import torch; from vendored import fused_linear_logprob as f; "
        "print(f(torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 4, 2])).logprobs.shape)"
    )
    result = run(code, cwd=tmp_path)
    assert result.stdout.strip() == "torch.Size([3])", result.stderr
