// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line, and what follows from it.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{ArgAction, Parser, ValueEnum};
use thiserror::Error;

use crate::faults::Fault;
use crate::limits;
use crate::types::{self, DeviceType};
use crate::virtio::{bit, F_RING_RESET};

/// Largest number of virtqueues: what fits the notify page and the MSI-X table.
pub const MAX_QUEUES: u16 = 256;

const PAGE: u64 = 4096;

/// Fewer bytes are in a region by chance, sooner or later.
const FEWEST_WATCHED: usize = 4;

/// A virtio PCI device that cannot touch guest memory.
///
/// Presents a modern virtio device over vfio-user, with VIRTIO_F_SWIOTLB and a
/// region of its own in a BAR, and relays its queues to a vhost-user backend
/// that is given that region and nothing else.
#[derive(Parser, Clone, Debug)]
#[command(name = "swiotlb-device", version)]
pub struct Options {
    /// vfio-user socket to listen on
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,

    /// vhost-user socket of the backend
    #[arg(long, value_name = "PATH")]
    pub backend: PathBuf,

    /// Device type: a name (blk, net, fs, scsi, rng, console, vsock...) or a virtio ID
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_type, default_value = "blk")]
    pub device_type: DeviceType,

    /// Length of the region in bytes, with suffix K, M or G if wanted
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "16M")]
    pub region_size: u64,

    /// Where in its BAR the region begins
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0")]
    pub region_offset: u64,

    /// Whether FEATURES_OK is refused when VIRTIO_F_SWIOTLB was not accepted
    #[arg(long, value_enum, default_value = "required")]
    pub mode: Mode,

    /// Offer VIRTIO_F_SWIOTLB (bit 27)
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "yes")]
    pub offer_swiotlb: bool,

    /// Present the capability that names the region
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "yes")]
    pub capability: bool,

    /// Offer VIRTIO_F_ACCESS_PLATFORM (bit 33)
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "no")]
    pub access_platform: bool,

    /// Offer VIRTIO_F_RING_PACKED (bit 34); the backend must have it
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "no")]
    pub packed: bool,

    /// Offer VIRTIO_F_INDIRECT_DESC (bit 28) if the backend has it
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "yes")]
    pub indirect: bool,

    /// Offer VIRTIO_F_EVENT_IDX (bit 29) if the backend has it; without it more
    /// chains are looked at before they are done
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "yes")]
    pub event_idx: bool,

    /// Feature bits to offer beside the backend's, which is not told of them: of
    /// configuration space (--config), or 40, a queue's reset
    #[arg(long, value_name = "N[+N]...", value_parser = parse_bits, default_value = "")]
    pub add_features: u64,

    /// Feature bits of the backend that are not offered
    #[arg(long, value_name = "N[+N]...", value_parser = parse_bits, default_value = "")]
    pub hide_features: u64,

    /// Take guest memory that a client shares, and use it: for benchmarks that
    /// compare with direct DMA, and nothing else
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "no")]
    pub allow_guest_memory: bool,

    /// What is wrong with the device, for tests of a guest (more than one with commas)
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    pub fault: Vec<Fault>,

    /// At each reset draw anew what is wrong; the same seed draws the same
    #[arg(long, value_name = "SEED", conflicts_with = "fault")]
    pub chaos: Option<u64>,

    /// How many milliseconds a reset waits for requests that the backend has taken
    #[arg(long, value_name = "MS", default_value = "1000")]
    pub drain: u16,

    /// Be a good device until a driver has set FEATURES_OK so many times
    #[arg(long, value_name = "N", default_value = "0")]
    pub fault_after: u64,

    /// Number of virtqueues [default: the fewest that the type can have]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES as i64))]
    pub queues: Option<u16>,

    /// How many of the virtqueues, the last, the backend does not know: what the
    /// driver puts there stays there
    #[arg(long, value_name = "N", default_value = "0")]
    pub idle_queues: u16,

    /// Largest size of a virtqueue, a power of two
    #[arg(long, value_name = "N", default_value = "256")]
    pub queue_size: u16,

    /// Bytes of configuration space to ask the backend for [default: by type]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(0..=256))]
    pub config_size: Option<u32>,

    /// Configuration space in hexadecimal, for a backend that offers none
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    pub config: Option<HexBytes>,

    /// Bytes, in hexadecimal, that must never be in the region: it is searched for
    /// them all the time (more than one with commas)
    #[arg(long, value_name = "HEX", value_parser = parse_hex, value_delimiter = ',')]
    pub watch: Vec<HexBytes>,

    /// Give up what the device does not need once it listens: system calls and
    /// the file system
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "yes")]
    pub sandbox: bool,

    /// Write a report to FILE (JSON lines)
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,

    /// End when the first client disconnects, instead of listening again
    #[arg(long)]
    pub once: bool,

    /// Say on standard error what is going on
    #[arg(long, short)]
    pub verbose: bool,
}

/// What becomes of a driver that does not accept VIRTIO_F_SWIOTLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// It is refused at FEATURES_OK.
    Required,
    /// It may go on, and fails at the first address outside the region.
    Optional,
}

/// A newtype, so that clap takes a vector as one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HexBytes(pub Vec<u8>);

impl HexBytes {
    pub fn hex(&self) -> String {
        self.0.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptionsError {
    #[error("--region-size {0} is not a multiple of {PAGE} bytes above zero")]
    RegionSize(u64),
    #[error("--region-offset {0} is not a multiple of {PAGE} bytes")]
    RegionOffset(u64),
    #[error("--region-offset and --region-size together exceed 1T")]
    BarSize,
    #[error("--region-offset and --region-size together exceed 4G, where the capability ends")]
    CapabilityRange,
    #[error("--fault {0} needs --region-offset and --region-size that together are 2G at most")]
    FaultRange(String),
    #[error("--chaos needs --region-offset and --region-size that together are 2G at most")]
    ChaosRange,
    #[error("--queue-size {0} is not a power of two from 2 to 32768")]
    QueueSize(u16),
    #[error("--queue-size {0} and --indirect no leave no room for a request")]
    QueueRoom(u16),
    #[error("--idle-queues {0} leaves no virtqueue to the backend")]
    IdleQueues(u16),
    #[error("--watch has a pattern of less than {FEWEST_WATCHED} bytes")]
    Watch,
    #[error("--add-features has bits that neither a device type nor this device has")]
    AddFeatures,
}

/// What a device type may have of feature bits (virtio 1.4, 2.2), and the reset
/// of a queue.
const ADDABLE: u64 = 0xfffc_0000_00ff_ffff | bit(F_RING_RESET);

impl Options {
    /// Checks what clap cannot.
    pub fn validate(&self) -> Result<(), OptionsError> {
        if self.region_size == 0 || self.region_size % PAGE != 0 {
            return Err(OptionsError::RegionSize(self.region_size));
        }
        if self.region_offset % PAGE != 0 {
            return Err(OptionsError::RegionOffset(self.region_offset));
        }
        let end = match self.region_offset.checked_add(self.region_size) {
            Some(end) if end <= 1 << 40 => end,
            _ => return Err(OptionsError::BarSize),
        };
        // The capability has 32 bits for the offset, and 32 for the length.
        if self.capability && end > 1 << 32 {
            return Err(OptionsError::CapabilityRange);
        }
        // What lies behind a BAR of 4 GiB cannot be named with 32 bits.
        if self.capability && end.next_power_of_two() >= 1 << 32 {
            let mut faults = self.fault.iter();
            if let Some(fault) = faults.find(|fault| fault.names_what_follows_bar()) {
                return Err(OptionsError::FaultRange(fault.name()));
            }
            if self.chaos.is_some() {
                return Err(OptionsError::ChaosRange);
            }
        }
        if !self.queue_size.is_power_of_two() || self.queue_size < 2 {
            return Err(OptionsError::QueueSize(self.queue_size));
        }
        if !self.indirect && self.queue_size < limits::least_queue_size(self.device_type.id) {
            return Err(OptionsError::QueueRoom(self.queue_size));
        }
        if self.idle_queues >= self.queue_count() {
            return Err(OptionsError::IdleQueues(self.idle_queues));
        }
        if self.add_features & !ADDABLE != 0 {
            return Err(OptionsError::AddFeatures);
        }
        if self
            .watch
            .iter()
            .any(|bytes| bytes.0.len() < FEWEST_WATCHED)
        {
            return Err(OptionsError::Watch);
        }
        Ok(())
    }

    /// Those that the backend serves come first.
    pub fn served_queues(&self) -> u16 {
        self.queue_count() - self.idle_queues
    }

    pub fn queue_count(&self) -> u16 {
        self.queues.unwrap_or(self.device_type.queues)
    }

    pub fn config_length(&self) -> u32 {
        self.config_size.unwrap_or(self.device_type.config_size)
    }
}

fn parse_type(text: &str) -> Result<DeviceType, String> {
    types::lookup(text).ok_or_else(|| {
        format!(
            "neither a virtio ID from 1 to 63 nor one of {}",
            types::names()
        )
    })
}

fn parse_yes_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("say yes or no".into()),
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    number
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| "not a size such as 4096, 64K, 16M or 1G".into())
}

fn parse_bits(text: &str) -> Result<u64, String> {
    let number = |word: &str| word.parse().ok().and_then(|n| 1u64.checked_shl(n));
    text.split('+')
        .filter(|word| !word.is_empty())
        .try_fold(0, |bits, word| Some(bits | number(word)?))
        .ok_or_else(|| "not numbers from 0 to 63 with + between them".into())
}

fn parse_hex(text: &str) -> Result<HexBytes, String> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).map(|d| d as u8))
        .collect();
    match digits {
        Some(d) if d.len() % 2 == 0 && d.len() <= 512 => Ok(HexBytes(
            d.chunks(2).map(|pair| (pair[0] << 4) | pair[1]).collect(),
        )),
        _ => Err("not an even number of hexadecimal digits, 512 at most".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(more: &[&str]) -> Options {
        let mut args = vec!["swiotlb-device", "--socket", "a", "--backend", "b"];
        args.extend(more);
        Options::try_parse_from(args).expect("options")
    }

    #[test]
    fn clap_is_content() {
        Options::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("64K"), Ok(65536));
        assert_eq!(parse_size("1g"), Ok(1 << 30));
        assert_eq!(parse_size("0x1000"), Ok(4096));
        for bad in ["", "K", "-1", "1T", "99999999999G", "é"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hex() {
        assert_eq!(parse_hex("00ff"), Ok(HexBytes(vec![0, 255])));
        assert!(parse_hex("0").is_err());
        assert!(parse_hex("zz").is_err());
    }

    #[test]
    fn feature_bits() {
        assert_eq!(parse_bits(""), Ok(0));
        assert_eq!(parse_bits("3+5+63"), Ok(0x8000_0000_0000_0028));
        for bad in ["64", "-1", "3,5", "x"] {
            assert!(parse_bits(bad).is_err(), "{bad}");
        }
        let added = |text| parse(&["--add-features", text]).validate();
        assert_eq!(added("5+40"), Ok(()));
        assert_eq!(added("27"), Err(OptionsError::AddFeatures));
    }

    #[test]
    fn patterns() {
        let options = parse(&["--watch", "00112233,445566778899"]);
        assert_eq!(options.validate(), Ok(()));
        assert_eq!(options.watch[1].0, [0x44, 0x55, 0x66, 0x77, 0x88, 0x99]);
        let short = parse(&["--watch", "00112233,445566"]);
        assert_eq!(short.validate(), Err(OptionsError::Watch));
    }

    #[test]
    fn some_queues_are_served() {
        let options = parse(&["--queues", "3", "--idle-queues", "1"]);
        assert_eq!((options.validate(), options.served_queues()), (Ok(()), 2));
        let none = parse(&["--queues", "3", "--idle-queues", "3"]);
        assert_eq!(none.validate(), Err(OptionsError::IdleQueues(3)));
    }

    #[test]
    fn defaults_are_valid() {
        let options = parse(&[]);
        assert_eq!(options.validate(), Ok(()));
        assert_eq!(options.queue_count(), 1);
        assert_eq!(options.mode, Mode::Required);
        assert!(options.offer_swiotlb && options.capability);
        assert!(!options.allow_guest_memory);
    }

    #[test]
    fn impossible_geometry_is_refused() {
        let check = |more: &[&str]| parse(more).validate();
        assert!(matches!(
            check(&["--region-size", "100"]),
            Err(OptionsError::RegionSize(100))
        ));
        assert!(matches!(
            check(&["--region-size", "0"]),
            Err(OptionsError::RegionSize(0))
        ));
        assert!(matches!(
            check(&["--region-offset", "1"]),
            Err(OptionsError::RegionOffset(1))
        ));
        assert!(matches!(
            check(&["--region-size", "2048G"]),
            Err(OptionsError::BarSize)
        ));
        assert!(matches!(
            check(&["--region-offset", "16777216G", "--region-size", "4K"]),
            Err(OptionsError::BarSize)
        ));
        assert!(matches!(
            check(&["--queue-size", "100"]),
            Err(OptionsError::QueueSize(100))
        ));
        let room = |kind| check(&["--type", kind, "--queue-size", "2", "--indirect", "no"]);
        assert_eq!(room("blk"), Err(OptionsError::QueueRoom(2)));
        assert_eq!(room("rng"), Ok(()));
    }

    #[test]
    fn the_region_lies_where_its_capability_can_name_it() {
        let check = |offset, size, capability| {
            let more = [
                "--region-offset",
                offset,
                "--region-size",
                size,
                "--capability",
                capability,
            ];
            parse(&more).validate()
        };
        let outside = Err(OptionsError::CapabilityRange);
        assert_eq!(check("4G", "16M", "yes"), outside);
        assert_eq!(check("0", "8G", "yes"), outside);
        assert_eq!(check("4K", "4G", "yes"), outside);
        assert_eq!(check("4G", "16M", "no"), Ok(()));
        assert_eq!(check("0", "4G", "yes"), Ok(()));
        assert_eq!(check("4194300K", "4K", "yes"), Ok(()));
    }

    #[test]
    fn what_follows_a_bar_can_be_named() {
        let check = |size, more: &[&str]| {
            let mut args = vec!["--region-size", size];
            args.extend(more);
            parse(&args).validate()
        };
        for fault in ["cap-next-device", "cap-exceeds-bar"] {
            let refused = Err(OptionsError::FaultRange(fault.into()));
            assert_eq!(check("4G", &["--fault", fault]), refused);
            assert_eq!(check("2097156K", &["--fault", fault]), refused);
            assert_eq!(check("2G", &["--fault", fault]), Ok(()));
        }
        let refused = Err(OptionsError::ChaosRange);
        assert_eq!(check("4G", &["--chaos", "1"]), refused);
        assert_eq!(check("2G", &["--chaos", "1"]), Ok(()));
        assert_eq!(check("4G", &["--fault", "cap-empty"]), Ok(()));
    }
}
