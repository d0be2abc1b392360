// SPDX-License-Identifier: GPL-2.0

//! Sets of device types: those of a parameter, and those that are bounced by default.
//!
//! Pure: may be called in any context.

use core::fmt;

/// The names of device types: those of their drivers in Linux without "virtio".
const NAMES: [(&str, u8); 27] = [
    ("net", 1),
    ("blk", 2),
    ("console", 3),
    ("rng", 4),
    ("balloon", 5),
    ("rpmsg", 7),
    ("scsi", 8),
    ("9p", 9),
    ("rproc_serial", 11),
    ("caif", 12),
    ("gpu", 16),
    ("rtc", 17),
    ("input", 18),
    ("vsock", 19),
    ("crypto", 20),
    ("iommu", 23),
    ("mem", 24),
    ("snd", 25),
    ("fs", 26),
    ("pmem", 27),
    ("hwsim", 29),
    ("scmi", 32),
    ("i2c", 34),
    ("can", 36),
    ("bt", 40),
    ("gpio", 41),
    ("spi", 45),
];

/// A set of device types (virtio 1.4, 5), of which each is below 256.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Types([u64; 4]);

impl Types {
    /// The types whose drivers were tried with a region, each with a real backend (drivers.rst).
    pub const TRIED: Self = Self::of(&[1, 2, 3, 4, 8, 18, 19, 25, 26, 34, 41]);

    /// The types of these numbers, of which none is 0.
    pub const fn of(kinds: &[u8]) -> Self {
        let mut types = Self([0; 4]);
        let mut at = 0;
        while at < kinds.len() {
            let kind = kinds[at];
            types.0[kind as usize / 64] |= 1 << (kind % 64);
            at += 1;
        }
        types
    }

    /// The types that `list` names, separated by commas: names of [`Names`], or decimal numbers
    /// from 1 to 255. An empty list has none.
    ///
    /// # Errors
    ///
    /// The first word that is neither.
    pub fn parse(list: &str) -> Result<Self, &str> {
        let mut types = Self::default();
        if list.is_empty() {
            return Ok(types);
        }
        for word in list.split(',') {
            let named = NAMES.iter().find(|(name, _)| *name == word);
            let kind = match (named, word.parse::<u8>()) {
                (Some(&(_, kind)), _) | (None, Ok(kind @ 1..)) => kind,
                _ => return Err(word),
            };
            types.0[usize::from(kind / 64)] |= 1 << (kind % 64);
        }
        Ok(types)
    }

    /// Whether `kind` is in the set.
    pub fn has(&self, kind: u32) -> bool {
        let word = self.0.get((kind / 64) as usize);
        word.is_some_and(|word| word & (1 << (kind % 64)) != 0)
    }

    /// All of them, in order.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (1..256).filter(move |kind| self.has(*kind))
    }
}

/// All names, for a message.
pub struct Names;

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, _)) in NAMES.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{name}")?;
        }
        Ok(())
    }
}

/// The name of this device type in a parameter, or its number if it has no name.
pub struct Name(pub u32);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.iter().find(|(_, kind)| u32::from(*kind) == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(any(test, CONFIG_KUNIT))]
#[cfg_attr(CONFIG_RUST, kernel::prelude::kunit_tests(virtio_swiotlb_policy_types))]
mod tests {
    use super::{
        super::super::wire::is_shown_as,
        *, //
    };

    #[test]
    fn list_of_words_and_numbers() {
        let types = Types::parse("rng,1,9p,63,64,255");
        assert!(types.is_ok());
        for kind in 0..1024 {
            let listed = [1, 4, 9, 63, 64, 255].contains(&kind);
            assert_eq!(types.is_ok_and(|types| types.has(kind)), listed);
        }
        assert_eq!(Types::parse(""), Ok(Types::default()));
        assert!(!Types::default().has(u32::MAX));
    }

    #[test]
    fn tried_types_have_names() {
        let names = "net,blk,console,rng,scsi,input,vsock,snd,fs,i2c,gpio";
        assert_eq!(Types::parse(names), Ok(Types::TRIED));
        assert_eq!(Types::TRIED.iter().count(), 11);
        assert!(Types::TRIED.iter().all(|kind| Types::TRIED.has(kind)));
    }

    #[test]
    fn every_name_means_its_number() {
        for (word, kind) in NAMES {
            let kind = u32::from(kind);
            let types = Types::parse(word);
            assert!(types.is_ok_and(|types| (0..256).all(|k| types.has(k) == (k == kind))));
            assert!(is_shown_as(Name(kind), word));
        }
        assert!(is_shown_as(Name(240), "240"));
    }

    #[test]
    fn what_is_no_type_is_told() {
        for (list, wrong) in [
            ("net,nett", "nett"),
            ("virtio_blk", "virtio_blk"),
            ("Net", "Net"),
            ("0", "0"),
            ("256", "256"),
            ("-1", "-1"),
            ("0x1", "0x1"),
            ("net,", ""),
            (",", ""),
            ("net, blk", " blk"),
        ] {
            assert_eq!(Types::parse(list), Err(wrong));
        }
    }
}
