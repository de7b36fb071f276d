from pathlib import Path

from setuptools import setup

FOLDERS = ("kernels", "rollout", "grpo")
CORE = ["torch>=2.11", "triton>=3.6", "numpy", "einops"]
TRAIN = ["safetensors", "tokenizers", "jinja2", "gguf", "huggingface_hub", "matplotlib"]
TEST = ["pytest", "hypothesis", "pytest-benchmark", "ruff", "transformers", "peft", "bitsandbytes"]
PEERS = ["trl", "liger-kernel", "cut-cross-entropy", "bitsandbytes", "gemlite", "peft", "unsloth_zoo", "verl"]

setup(
    name="nanogrpo",
    version="0.1.0",
    description="GRPO fine-tuning of language models in very little VRAM, from scratch in torch and Triton",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[f"nanogrpo.{folder}" for folder in FOLDERS],
    package_dir={f"nanogrpo.{folder}": folder for folder in FOLDERS},
    install_requires=CORE,
    extras_require={"train": TRAIN, "test": TRAIN + TEST, "peers": PEERS},
    entry_points={"console_scripts": ["nanogrpo=nanogrpo.grpo.__main__:main"]},
)
