# build, install, try. `make install` activates nothing: see docs/admin-guide.md.
PREFIX ?= /usr/local
PLUGINDIR ?= $(PREFIX)/lib/slurm
RELEASE ?= trixie
ENGINE ?= auto

build:
	cargo build --release --locked

install: build
	sh packaging/install.sh "$(DESTDIR)" "$(PREFIX)" "$(PLUGINDIR)"

demo:
	sh tests/setup.sh && cargo build -q --locked && cargo run -q --locked -p lab --bin demo -- $(ENGINE)

shell:
	sh tests/setup.sh && cargo build -q --locked && cargo run -q --locked -p lab --bin lab -- shell $(RELEASE)

test:
	sh tests/setup.sh && sh tests/run.sh

bench:
	sh tests/setup.sh && cargo build -q --release --locked && cargo run -q --release --locked -p lab --bin bench

deb: build
	sh packaging/deb.sh

rpm: build
	sh packaging/rpm.sh

.PHONY: build install demo shell test bench deb rpm
