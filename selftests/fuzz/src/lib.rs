// SPDX-License-Identifier: GPL-2.0

//! What must hold of the module's pure files for any bytes. The targets in
//! `fuzz_targets` call it, and so do the tests here, with a few bytes of no
//! particular meaning.

#![forbid(unsafe_code)]
// What only the kernel half of the module calls has no caller here.
#![allow(dead_code)]
// In a KUnit case an assertion is the way to fail: a panic would stop the kernel.
#![allow(clippy::assertions_on_constants)]

#[path = "../../host/src/platform.rs"]
mod platform;
#[path = "../../../rust/policy.rs"]
#[allow(unreachable_pub)]
mod policy;
#[path = "../../../rust/pool.rs"]
mod pool;
#[path = "../../../rust/wire.rs"]
#[allow(unreachable_pub)]
mod wire;

mod input;
mod model;
mod rules;

pub use model::pool;
pub use rules::{policy, wire};

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_of_no_meaning() {
        let mut state = 1u64;
        let mut byte = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 56) as u8
        };
        for len in 0..600 {
            let data: Vec<u8> = (0..len).map(|_| byte()).collect();
            super::wire(&data);
            super::policy(&data);
            super::pool(&data);
        }
    }
}
