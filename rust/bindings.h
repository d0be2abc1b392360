/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Input of bindgen for the bindings of this module.
 *
 * Only virtio's own types and functions are taken from here (the allowlist in Kbuild). All types
 * that they refer to, such as struct device, are those of the kernel crate, so that both use the
 * same Rust types.
 */
#include <linux/virtio.h>
#include <linux/virtio_config.h>

#include "helpers.h"
#if IS_BUILTIN(CONFIG_KUNIT)
#include "tests/transport.h"
#endif
