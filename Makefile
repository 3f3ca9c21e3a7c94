# What a person calls, and what CI calls. `make` alone lists the targets.
#
# Everything stays inside this folder: Python packages in .venv, Rust objects in target (or CARGO_TARGET_DIR), tools in
# .tools. Only `make system` touches the machine, and says what it does.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON := $(VENV)/bin/python
PROFILE ?= release
EXTRAS := report,bench,clients,asgi,control,test,dev
PROVE_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
CHAOS_ARGS ?=
TEST_ARGS ?=

# PROFILE is Cargo's: with `tests` the module shares what `make test` compiles anyway.
# One interpreter for maturin, cargo test and clippy: else each run would build pyo3 again.
export PYO3_PYTHON := $(abspath $(PYTHON))

RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock crates/*/Cargo.toml) $(shell find crates -name '*.rs' 2>/dev/null)
CARGO_DENY_VERSION := 0.20.2
CARGO_DENY := $(or $(shell command -v cargo-deny),$(abspath .tools)/bin/cargo-deny)

.PHONY: help setup prove test check bench chaos sim fuzz matrix netns docs system clean
help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/.built ## create .venv, install what is needed and build the engine; does nothing when it is up to date

prove: setup ## set up, then show the whole argument live (PROVE_ARGS="--quick" for a minute of it)
	$(VENV)/bin/fourtuple prove $(PROVE_ARGS)

test: setup ## set up, then run every test of both languages; the last line counts them
	$(PYTHON) tests/run.py $(TEST_ARGS)

check: setup $(CARGO_DENY) ## ruff, mypy, stubtest, lint-imports, rustfmt, clippy, cargo deny
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict python tests bench docs fuzz
	$(PYTHON) -m mypy.stubtest --mypy-config-file pyproject.toml fourtuple._core
	$(VENV)/bin/lint-imports --no-logo
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --release --locked -- -D warnings
	$(CARGO_DENY) --log-level error --locked check licenses bans sources
	@if reason=$$(timeout 120 $(CARGO_DENY) --log-level error fetch db 2>&1 </dev/null); then \
	    $(CARGO_DENY) --log-level error --locked check --disable-fetch advisories; \
	else \
	    echo "advisories: not checked, their database cannot be fetched: $$(tail -n 1 <<< "$$reason")"; \
	fi
	@echo "make check: clean"

bench: setup ## measure ours beside asyncio, uvloop and plain connect()
	$(PYTHON) -m bench $(BENCH_ARGS)

chaos: setup ## ten minutes of kills, floods, upgrades and clock jumps with a checker (CHAOS_ARGS="--seconds 60 --seed 7")
	$(PYTHON) -m bench.chaos $(CHAOS_ARGS)

sim: ## the load, echo and broker cores in the seeded simulator (FOURTUPLE_SEEDS=100000 for more worlds)
	FOURTUPLE_SEEDS=$${FOURTUPLE_SEEDS:-10000} cargo test --release --locked -p fourtuple-carrier \
	    --test simulation --test broker -- --nocapture

fuzz: ## every parser of hostile bytes under libFuzzer, FUZZ_S seconds each, 15 if not given (FUZZ_ARGS="tls rows": those)
	$(or $(wildcard $(PYTHON)),python3) fuzz/run.py --seconds $${FUZZ_S:-15} $(FUZZ_ARGS)

matrix: setup ## TLS hellos in every cut, ours beside HAProxy, nginx and sslh; writes docs/sniffing.md
	$(PYTHON) -m bench.matrix --record
	$(PYTHON) docs/generate.py

netns: setup ## the tests that use the real kernel, in network namespaces of their own
	$(PYTHON) -m pytest tests/netns

docs: setup ## write the pages of the limits catalogue from the code
	$(PYTHON) docs/generate.py

system: ## install the system packages that tests use (root with apt-get only); starts none of their services
	@missing=(); \
	for pair in nft:nftables ip:iproute2 setpriv:util-linux unshare:util-linux ps:procps \
	        curl:curl dnsmasq:dnsmasq-base wrk:wrk redis-benchmark:redis-tools hey:hey gcc:gcc c++:g++ musl-gcc:musl-tools \
	        openssl:openssl ssh:openssh-client nghttp:nghttp2-client mosquitto_pub:mosquitto-clients psql:postgresql-client \
	        nginx:nginx-light haproxy:haproxy sslh-select:sslh redis-server:redis-server postgres:postgresql \
	        mosquitto:mosquitto sshd:openssh-server gunicorn:gunicorn dovecot:dovecot-imapd mariadbd:mariadb-server mariadb:mariadb-client slapd:slapd ldapsearch:ldap-utils ldapwhoami:ldap-utils \
	        rdesktop:rdesktop Xvfb:xvfb systemd-analyze:systemd \
	        nmap:nmap sslscan:sslscan socat:socat; do \
	    PATH="$$PATH:/usr/sbin:$$(echo /usr/lib/postgresql/*/bin | tr ' ' :)" command -v "$${pair%%:*}" >/dev/null \
	        || missing+=("$${pair##*:}"); \
	done; \
	[ -e /usr/lib/python3/dist-packages/proton ] || missing+=(python3-qpid-proton); \
	[ -e /usr/lib/dovecot/pop3-login ] || missing+=(dovecot-pop3d); \
	[ -e /usr/lib/nginx/modules/ngx_stream_module.so ] || missing+=(libnginx-mod-stream); \
	if [ "$${#missing[@]}" = 0 ]; then echo "system: nothing is missing"; \
	elif [ "$$(id -u)" != 0 ]; then echo "system: not root, so these stay missing: $${missing[*]}; tests that need them skip"; \
	elif ! command -v apt-get >/dev/null; then echo "system: no apt-get; install yourself: $${missing[*]}"; \
	else \
	    daemons() { ps -eo comm= | grep -xE 'nginx|haproxy|sslh|sslh-select|redis-server|postgres|mosquitto|sshd|gunicorn|dovecot|mariadbd|slapd' | sort | uniq -c; }; \
	    policy=/usr/sbin/policy-rc.d; before=$$(daemons || true); \
	    if [ ! -e "$$policy" ]; then \
	        trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
	        printf '#!/bin/sh\nexit 101\n' >"$$policy"; chmod +x "$$policy"; \
	    fi; \
	    apt-get update -q; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$${missing[@]}"; \
	    [ "$$(daemons || true)" = "$$before" ] || { echo "system: a service was started; stop it" >&2; exit 1; }; \
	fi

clean: ## remove what the other targets made
	rm -rf $(VENV) .tools target dist report.html .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f python/fourtuple/*.so
	find python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.maturin: pyproject.toml
	@command -v cargo >/dev/null || { \
	    echo "make: cargo is not installed; fourtuple's engine is Rust. Install it from https://rustup.rs" >&2; exit 1; }
	@found=; for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
	    $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { found=$$candidate; break; }; \
	done; \
	[ -n "$$found" ] || { echo "make: Python 3.11 or newer is not installed" >&2; exit 1; }; \
	[ -x $(PYTHON) ] || $$found -m venv $(VENV) || { \
	    echo "make: $$found cannot make a virtual environment; on Debian install python3-venv" >&2; exit 1; }
	$(PYTHON) -m pip install -q 'maturin>=1.13,<2'
	@touch $@

$(VENV)/.built: $(VENV)/.maturin $(RUST_SOURCES)
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/maturin develop --profile $(PROFILE) --extras $(EXTRAS)
	@# As pip does for what it copies; else, with PYTHONDONTWRITEBYTECODE, each start compiles the sources anew.
	@$(PYTHON) -m compileall -q python
	@touch $@

$(abspath .tools)/bin/cargo-deny:
	CARGO_PROFILE_DEV_DEBUG=0 cargo install -q --debug cargo-deny --locked --version $(CARGO_DENY_VERSION) --root .tools
