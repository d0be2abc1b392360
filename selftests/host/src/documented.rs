// SPDX-License-Identifier: GPL-2.0

//! The capability of the wire format's example, as the module reads it. The device's side of
//! this is in `device/swiotlb-rings/src/capability.rs`.

use crate::wire::{
    capabilities::{ConfigSpace, Search},
    device_type, Bar, Finding,
};

/// Where the BAR is that the example names.
const BAR4: u64 = 0x38_0000_0000;

/// The bytes of the example, as they stand in the document.
fn documented() -> Vec<u8> {
    let text = include_str!("../../../Documentation/wire-format.rst");
    let example = text.split(".. capability-bytes\n").nth(1).expect("a mark");
    example
        .split(['\n', ' ', '\t'])
        .skip_while(|word| *word != "09")
        .filter(|word| !word.is_empty())
        .map_while(|word| u8::from_str_radix(word, 16).ok())
        .collect()
}

#[test]
fn the_documented_capability_names_a_region() {
    let capability = documented();
    assert_eq!(capability.len(), 16);
    let mut space = [0; 256];
    // There is a list of capabilities, and it begins behind the header.
    space[0x06] = 0x10;
    space[0x34] = 0x40;
    space[0x40..0x50].copy_from_slice(&capability);
    let mut bars = [Bar::Absent; 6];
    bars[4] = Bar::Memory {
        start: BAR4,
        bytes: 32 << 20,
        prefetchable: true,
    };
    let search = Search {
        bars: &bars,
        page: 4096,
        device_type: device_type::BLK,
    };
    let Finding::Usable(region) = ConfigSpace::new(&space).region(&search) else {
        panic!("no region");
    };
    assert_eq!((region.start, region.bytes), (BAR4 + 0x1_0000, 16 << 20));
}
