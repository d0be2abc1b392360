// SPDX-License-Identifier: GPL-2.0
use kernel::prelude::*;
mod bindings;
module! {
    type: S, name: "virtio_swiotlb", authors: ["x"], description: "x", license: "GPL",
}
struct S;
impl kernel::Module for S { fn init(_m: &'static ThisModule) -> Result<Self> { Ok(S) } }
