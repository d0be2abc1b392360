// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device and the relay have in common: each is a program that takes one
//! Unix socket, connects to another, and works in a sandbox. There is nothing of a
//! device in here.

#![deny(unsafe_code)]
#![warn(missing_docs)]

mod lines;
mod listen;
pub mod sandbox;

pub use lines::{Line, Lines};
pub use listen::{listen, ListenError};

/// The example of the README is compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
