# The same names for everyone, CI included.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.1
MODEL  ?= models/bundled
HOSTS  ?= 2
PORT   ?= 8000
SEEDS  ?= 100000
MINUTES ?= 60
BIN    := .venv/bin
STAMP  := .venv/.installed
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: env serve test check format bench soak bundled clean

env: $(STAMP)

# torch for GPUs brings the Triton that it was built with; on CPUs it interprets the GPU kernels, in the tests
# the kernels are compiled while pip, on one core, installs; bytecode is by all cores, and of what is used: neither
# packages' tests nor other models'; what does not compile are packages' templates
$(STAMP): pyproject.toml constraints.txt kernels/build.py $(wildcard kernels/csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m kernels.build & built=$$!; \
	$(PIP) "$(TORCH)" && $(PIP) -c constraints.txt -e '.[dev,nixl]'; installed=$$?; \
	wait $$built && exit $$installed
	@test "$$(uname)" != Linux || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) "$(TRITON)"
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/transformers/models/(?!auto|deepseek_v2)' .venv/lib || true
	@touch $(STAMP)

serve: env
	$(BIN)/shoal serve $(MODEL) --expert-hosts $(HOSTS) --port $(PORT)

# apart: Ray's client has hung in a process that had computed and forked much before
test: env
	$(BIN)/python -m pytest -m ray tests/end_to_end
	$(BIN)/python -m pytest -m 'not ray' -n 2 --dist loadfile

check: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

# the model in models/bundled anew, by its recipes: under two hours on two cores; docs/training.md says how it is examined
bundled: env
	test -e models/untrained || $(BIN)/python -m examples.bundled.untrained models/untrained
	$(BIN)/python -m examples.bundled.generate runs/bundled-data
	$(BIN)/shoal train examples/bundled/train.yaml
	$(BIN)/shoal train examples/bundled/last.yaml

# hours of seeded faults: first in the simulator, then on real processes
soak: env
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)
	$(BIN)/python -m tests.end_to_end.soak --minutes $(MINUTES)

# BENCH holds options of `shoal bench`; a quick run leaves README and the plots alone
bench: env
	$(BIN)/python -m bench $(if $(findstring --quick,$(BENCH)),,--report) $(BENCH)

format: env
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf .venv models/bench
