# Two commands do all the set-up: `make demo` and `make test`.
# RUNTIME=tf1 or RUNTIME=tf2 chooses TensorFlow 1.15 or 2.21, BUILD=cpu or BUILD=gpu its build and
# PYTHON=/path/to/python the interpreter. tools/make_env.sh decides what is not given.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

# horovodrun and python are those of the chosen environment
in_env = venv=$$(tools/make_env.sh --venv) && PATH="$$venv/bin:$$PATH"

.PHONY: help env test test-gpu demo clean

help:
	@echo "make demo      set up, then pre-train and evaluate MoCo v2 on CIFAR-10 (CPU)"
	@echo "make test      set up, then run the tests"
	@echo "make test-gpu  set up, then compare a GPU with the CPU, and measure its speed"
	@echo "make env       only set up"
	@echo "make clean     remove what make env made; data, runs and results stay"
	@echo ""
	@echo "The first four take RUNTIME=tf1 or RUNTIME=tf2 (TensorFlow 1.15 or 2.21) and BUILD=cpu or"
	@echo "BUILD=gpu (of TensorFlow); what is not given follows from this machine's Pythons and GPUs."

env:
	@tools/make_env.sh

test: env
	@$(in_env) && python -m pytest tests

test-gpu: env
	@$(in_env) && python -m pytest -rs tests/gpu

demo: env
	@$(in_env) && python tools/demo.py

# one file each for all environments
build/jpeg.so: libraries = $(shell pkg-config --cflags --libs libjpeg 2>/dev/null || echo -ljpeg)
build/%.so: %.cc
	@mkdir -p build
	@$${CXX:-g++} -std=c++11 -O3 -Wall -fPIC -shared $< $(libraries) -o $@.$$$$.tmp && \
	    mv $@.$$$$.tmp $@

clean:
	@rm -rf .venv-tf1* .venv-tf2* build zmq_ops/build .pytest_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
