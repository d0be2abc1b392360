// SPDX-License-Identifier: GPL-2.0

//! A file of the module, under its name there.

#[path = "../../../rust/policy/types.rs"]
#[allow(dead_code, unreachable_pub, missing_docs)]
pub(crate) mod types;
