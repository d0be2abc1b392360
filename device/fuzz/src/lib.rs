// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What must hold of the device for any guest, and of the relay for any device. The
//! targets in `fuzz_targets` call it, and so does the test here, with a few bytes of no
//! particular meaning.

#![forbid(unsafe_code)]

mod input;
mod registers;
mod relay;
mod rings;

pub use registers::registers;
pub use relay::relay;
pub use rings::rings;

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
            super::rings(&data);
            super::registers(&data);
            super::relay(&data);
        }
    }
}
