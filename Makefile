# Every target sets up what it needs and does nothing twice. `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# Where programs run: here, or in the Debian 12 user space that set-up makes on hosts whose own does not serve.
HERE := tools/userspace.sh exec

CLANG ?= clang
# Where linux-libc-dev puts asm/; expanded only when something is compiled.
MULTIARCH = $(shell $(HERE) /usr/bin/python3 -c 'import sysconfig; print(sysconfig.get_config_var("MULTIARCH"))')
BPF_FLAGS := -target bpf -mcpu=v2 -O2 -g -Wall -Werror
BPF_SOURCES := $(wildcard bpf/*.c bpf/*.h)
BPF_OBJECTS := build/enforcer.bpf.o build/enforcer-legacy.bpf.o

.PHONY: help setup setup-run setup-install setup-booted bpf run install uninstall deb test kernels booted attack demo bench soak fuzz lint
.PHONY: wheel fresh clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: OS packages (as root), .venv/, the BPF objects
	@tools/setup.sh all
	@$(MAKE) bpf

setup-run:
	@tools/setup.sh run
	@$(MAKE) bpf

setup-install:
	@tools/setup.sh install
	@$(MAKE) bpf

setup-booted:
	@tools/setup.sh booted
	@$(MAKE) bpf

run: setup-run ## enforce on this host until Ctrl-C, then take it out again; POLICY=file for another policy than the default
	@$(HERE) tools/run.sh $(if $(POLICY),--policy "$(POLICY)")

install: setup-install ## put the program, its units, man pages and completion below PREFIX (/usr/local), or DESTDIR and PREFIX
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" tools/install.sh install

uninstall: ## take them away again; the policy and what was learned stay
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" tools/install.sh uninstall

deb: setup-install ## a Debian package, in dist/
	@VERSION="$(VERSION)" tools/deb.sh

test: setup ## run every test and linter; PYTEST_ARGS="-k name" for some (root, or what needs it skips)
	@$(HERE) .venv/bin/python -m pytest $(PYTEST_ARGS)

kernels: setup ## boot every kernel that must hold under qemu and print a table; KERNELS="5.4 6.12" for some (root)
	@$(HERE) .venv/bin/python -m tests.vm $(KERNELS)

booted: setup-booted ## install the Debian package on a Debian that systemd boots, and do to it what hosts go through (root)
	@$(HERE) .venv/bin/python -m pytest tests/booted $(PYTEST_ARGS)

attack: setup ## try every known way around, one line each: refused, or out of scope and why (root)
	@$(HERE) .venv/bin/python -m tests.attacks

demo: setup ## allowed and refused pulls with docker and podman, in namespaces of their own
	@$(HERE) .venv/bin/python -m tests.lab.demo

bench: setup ## first connections to fresh names, beside a run without enforcement
	@$(HERE) .venv/bin/python -m tests.lab.bench
	@$(HERE) .venv/bin/python -m tests.lab.bench_guard
	@$(HERE) .venv/bin/python -m tests.lab.bench_reload

soak: setup ## everything at once for MINUTES=5, with restarts, reloads and churn; sizes and memory to build/soak.png (root)
	@$(HERE) .venv/bin/python -m tests.lab.soak $(if $(MINUTES),--minutes $(MINUTES))

fuzz: setup ## fuzz the parsers, 15 seconds each; MINUTES=5 for longer, TARGET=dns_message for one
	@$(HERE) .venv/bin/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(TARGET),--target $(TARGET))

lint: setup ## only the linters
	@$(HERE) .venv/bin/python -m pytest -q tests/test_style.py tests/test_layers.py

bpf: $(BPF_OBJECTS) ## compile the BPF objects, if a source changed
	@:

build/%.bpf.o: $(BPF_SOURCES)
	@echo "bpf: compiling $@"
	@mkdir -p build
	@$(HERE) $(CLANG) $(BPF_FLAGS) -I/usr/include/$(MULTIARCH) -c bpf/enforcer.bpf.c -o $@

build/enforcer-legacy.bpf.o: BPF_FLAGS += -DLEGACY_KERNEL

wheel: setup ## a wheel with the BPF objects and their source in it, in dist/
	@rm -rf enforcer/objects build/lib build/bdist.*
	@mkdir -p enforcer/objects/bpf
	@cp $(BPF_OBJECTS) enforcer/objects/
	@cp $(BPF_SOURCES) enforcer/objects/bpf/
	@# Copies that stayed would hide what `make bpf` compiles later.
	@trap 'rm -rf enforcer/objects' EXIT; \
	    $(HERE) .venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

fresh: ## prove that set-up works on a bare Debian, in a new system under build/ (root, network, minutes); SUITE=focal for Ubuntu's
	@tools/fresh.sh $(or $(SUITE),bookworm) $(if $(RUN),'$(RUN)')

clean: ## remove build products; .venv/ stays
	@rm -rf build dist enforcer/objects *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
