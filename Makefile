# SPDX-License-Identifier: GPL-2.0
#
# `make KDIR=<kernel build tree>` builds the module the ordinary out-of-tree way
# and needs nothing of what follows; all other targets do their own set-up, in
# $(BUILD). The kernel's build reads Kbuild, not this file.

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory

# Everything that is built, fetched or cached by the other targets.
export BUILD ?= $(CURDIR)/build
KDIR ?= /lib/modules/$(shell uname -r)/build
TOOLBOX := scripts/toolbox run
TEST_ARGS ?=
# The stock kernel of the guests' architecture.
STOCK := stock$(if $(filter arm64,$(ARCH)),-arm64)

# The kernel's build, make itself and mount options take these for something else.
unfit = $(if $(word 2,x$(subst :, ,$1)),$(error $1: a path with spaces or colons cannot be used, move it))
$(foreach name,CURDIR BUILD KDIR MO DESTDIR INSTALL_MOD_PATH,$(call unfit,$($(name))))

.DEFAULT_GOAL := modules
.PHONY: modules help demo ways check test check-full check-kernels shell kunit docs fmt toolbox stock test-kernel \
	device tools selftest-parts bench bench-check mutants soak load fuzz clean distclean install dkms patches

## modules: build virtio_swiotlb.ko for the kernel tree KDIR (default: the running kernel's); MO= says where to
modules:
	@scripts/lib/check-kdir "$(KDIR)"
	$(MAKE) -C "$(KDIR)" M=$(CURDIR) $(if $(MO),MO="$(abspath $(MO))") \
		$(shell scripts/lib/check-kdir --compiler "$(KDIR)") modules

# Where `make install` puts things; the kernel's own variable for modules wins.
INSTALL_MOD_PATH ?= $(DESTDIR)

## install: install the module for KDIR's kernel, and what loads it before the virtio drivers; honours DESTDIR
install: modules
	umask 022 && $(MAKE) -C "$(KDIR)" M=$(CURDIR) $(if $(MO),MO="$(abspath $(MO))") \
		INSTALL_MOD_PATH="$(INSTALL_MOD_PATH)" INSTALL_MOD_DIR=updates DEPMOD=true \
		modules_install
	packaging/install "$(DESTDIR)"
	umask 022 && depmod $(if $(INSTALL_MOD_PATH),-b "$(INSTALL_MOD_PATH)") \
		"$$(cat "$(KDIR)/include/config/kernel.release")"
	@echo "now: update-initramfs -u (or dracut -f), if a root file system needs it"

## dkms: a Debian package, into $(BUILD), that builds the module for every kernel which is installed
dkms:
	@packaging/deb "$(BUILD)"

## patches: the module, fixes for the kernel, and the feature in its virtio core, as patch series for the kernel's own tree, into $(BUILD)/patches
patches: toolbox
	@$(TOOLBOX) scripts/kernel source
	@$(TOOLBOX) scripts/export-patches

# How the guest of the demo finds the region: capability, dmb, acpi, devicetree, parameter or mmio.
WAY ?= capability

## demo: watch an unmodified driver in a stock kernel work through a device's own region; ARCH=arm64, WAY=dmb, acpi...
demo: toolbox
	@$(TOOLBOX) scripts/demo $(STOCK) --way $(WAY)

## ways: the demo for each way to a region, with a line of each
ways: toolbox
	@$(TOOLBOX) scripts/ways

## check: run all tests but the longest; TEST_ARGS= goes to pytest
check: toolbox
	@$(TOOLBOX) scripts/check $(TEST_ARGS)

# A file of the selftests, or a part of one: selftests/test_life.py::TestRebind.
T ?= selftests/test_path.py

## test: run the selftests in T (selftests/test_path.py), and make what they need; TEST_ARGS= goes to pytest
test: toolbox
	@$(TOOLBOX) python3 -B -m pytest -v --tb=short $(T) $(TEST_ARGS)

## check-full: run the selftests that take too long for `check`, and say what they cover; TEST_ARGS= goes to pytest
check-full: toolbox
	@$(TOOLBOX) scripts/check --full $(TEST_ARGS)

## check-kernels: run the selftests that need further kernels (7.2, realtime, sanitizers, arm64); more than an hour
check-kernels: toolbox
	@$(TOOLBOX) scripts/check --kernels $(TEST_ARGS)

## shell: a shell in a guest with one restricted disk; ARCH=arm64; GUEST_ARGS= as for scripts/guest
GUEST_ARGS ?= --restricted blk --module
shell: stock device
	@$(TOOLBOX) scripts/build module $(STOCK)
	@scripts/guest --kernel $(STOCK) $(GUEST_ARGS)

## kunit: run the module's KUnit suites in a guest
kunit: test-kernel
	@$(TOOLBOX) scripts/build module test
	@scripts/kunit

## bench: measure, beside the kernel's swiotlb, bare copies and direct DMA (15 minutes); BENCH_ARGS= as for scripts/bench
BENCH_ARGS ?=
bench: test-kernel device
	@$(TOOLBOX) scripts/kernel stock
	@$(TOOLBOX) scripts/kernel stock arm64
	@for kernel in test stock stock-arm64; do \
		$(TOOLBOX) scripts/build module $$kernel && $(TOOLBOX) scripts/build bench $$kernel || exit; \
	done
	@scripts/bench $(BENCH_ARGS)

## bench-check: compare instruction counts with those that were kept
bench-check: BENCH_ARGS := --check
bench-check: bench

## mutants: break the rules of the wire format one by one, and see the tests fail (more than an hour)
mutants: selftest-parts
	@scripts/mutants

## soak: guests whose devices draw other faults at each reset; SECONDS= (300), SEED= to do it again
soak: SECONDS ?= 300
soak: selftest-parts
	@$(TOOLBOX) env SOAK_SECONDS="$(SECONDS)" SOAK_SEED="$(SEED)" python3 -B -m pytest -q -s \
		--tb=short -m full selftests/test_soak.py

## load: 64 busy devices on 8 CPUs, and whether anything is lost; SECONDS= (7200)
load: SECONDS ?= 7200
load: selftest-parts
	@$(TOOLBOX) env LOAD_SECONDS="$(SECONDS)" python3 -B -m pytest -v --tb=short -m full \
		selftests/test_limits.py::TestBusyDevices

## fuzz: libFuzzer on the module's pure files and on the device, SECONDS= (60) for each target
fuzz: SECONDS ?= 60
fuzz: toolbox
	@$(TOOLBOX) scripts/fuzz $(SECONDS)

## docs: build the documentation as HTML, into $(BUILD)/docs
docs: toolbox
	@$(TOOLBOX) scripts/build docs

## fmt: format the Rust code
fmt: toolbox
	@$(TOOLBOX) scripts/gates fmt

## toolbox: the Debian root with all tools, without which nothing else works
toolbox:
	@scripts/toolbox make

## tools: a Debian package, into $(BUILD), with the program virtio-swiotlb for administrators of guests
tools: toolbox
	@$(TOOLBOX) scripts/build tools
	@$(TOOLBOX) packaging/deb-tools "$(BUILD)/target/release" "$(BUILD)"

# What the selftests want to be there.
selftest-parts: toolbox
	@$(TOOLBOX) scripts/check --prepare

## stock: the stock Debian kernel, and its tree prepared for Rust modules; ARCH=arm64 for that of arm64
stock: toolbox
	@$(TOOLBOX) scripts/kernel $(subst -, ,$(STOCK))

## test-kernel: the small kernel with KUnit (about 10 minutes, once)
test-kernel: toolbox
	@$(TOOLBOX) scripts/kernel test

## device: the reference device
device: toolbox
	@$(TOOLBOX) scripts/build device

## clean: remove what is built of this project; the toolbox and the kernels stay
clean:
	rm -rf "$(BUILD)/module" "$(BUILD)/target" "$(BUILD)/bench" "$(BUILD)/mmio-glue" "$(BUILD)/docs" "$(BUILD)/fuzz" "$(BUILD)/run" "$(BUILD)/log"
	rm -rf *.o *.ko *.mod *.mod.c .*.cmd rust/*.o rust/.*.cmd rust/bindings_generated.rs \
		Module.symvers modules.order .module-common.o

## distclean: remove everything that was built, fetched or cached
distclean: clean
	@scripts/toolbox remove
	rm -rf "$(BUILD)"

## help: this list
help:
	@sed -n 's/^## \([^:]*\): \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
