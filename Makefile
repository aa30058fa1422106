PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo study test test-cpus test-gpu kernels notebooks hosts newest nightly lint clean

demo: $(VENV)/.ready  ## train the small demo model on ink drawings, compare and score before and after; minutes on two CPU cores
	rm -rf outputs/demo
	$(BIN)/python train_opt.py --demo --output_dir outputs/demo/train_opt
	$(BIN)/python infer.py --demo --compare --lora outputs/demo/train_opt --output_dir outputs/demo
	$(BIN)/python demo/score.py --lora outputs/demo/train_opt --output_dir outputs/demo
	@echo "The comparison grid lies in outputs/demo/compare.png"

STUDY ?= --demo
study: $(VENV)/.ready  ## the four methods at equal budget; on a GPU: make study STUDY="-- --train_data_dir FOLDER"
	$(BIN)/python tools/study.py $(STUDY)

test: $(VENV)/.ready lint  ## every claim the suite makes that a CPU can check
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What PyTorch and oneDNN choose by the CPU, chosen by hand. AVX-512 can only be had where there is some: PyTorch does not look.
CPUS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
CPUS += $(if $(shell grep -m1 -o avx512vl /proc/cpuinfo),ATEN_CPU_CAPABILITY=avx512)
test-cpus: $(VENV)/.ready  ## the same as on other CPUs, with one thread and with two; an hour
	set -e; for threads in 1 2; do for cpu in $(CPUS); do \
		echo "$$cpu OMP_NUM_THREADS=$$threads"; \
		env $$cpu OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -n 2 --dist loadfile; \
	done; done

test-gpu: $(VENV)/.ready  ## the claims that need a CUDA GPU
	GPU_TESTS=1 $(BIN)/python -m pytest tests/test_gpu.py

TRITON ?= 3.6.0
kernels: $(VENV)/.ready  ## compile every kernel for a T4 and an A100, without a GPU; brings Triton (190 MB): make kernels TRITON=3.4.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .triton/$(TRITON) triton==$(TRITON)
	PYTHONPATH=.triton/$(TRITON) TRITON_CACHE_DIR=.triton/cache $(BIN)/python tools/compile_kernels.py

notebooks:  ## every notebook of dist/, run by a Jupyter kernel in an empty folder and a fresh environment
	$(PYTHON) -m venv .venv-notebooks
	.venv-notebooks/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== .ci/constraints.txt)" nbclient ipykernel
	OMP_NUM_THREADS=1 .venv-notebooks/bin/python tools/bundle.py --execute

hosts:  ## Kaggle's and Colab's packages: the install line on top, every notebook, with and without what it may upgrade
	$(PYTHON) tools/hosts.py kaggle colab

newest:  ## what requirements.txt brings today: the demo of every script
	$(PYTHON) tools/hosts.py newest

nightly:  ## the same without upper bounds: fails when what is newest anywhere breaks the suite
	$(PYTHON) tools/hosts.py latest

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .

clean:
	rm -rf $(VENV) .venv-notebooks .venv-hosts .triton outputs

$(VENV)/.ready: requirements.txt requirements-dev.txt .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c .ci/constraints.txt
	touch $@
