// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line, which a [`DeviceConfig`] is made from.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser};

use crate::config::{
    ConfigError, DeviceConfig, Dialect, Mode, Transport, MAX_CONFIG_SPACE, MAX_QUEUES,
};
use crate::ring::Window;
use crate::types::{self, DeviceType};
use crate::virtio::Offer;

/// Fewer bytes are in a region by chance, sooner or later.
const FEWEST_WATCHED: usize = 4;

/// A virtio device that cannot touch guest memory.
///
/// Presents a modern virtio PCI device over vfio-user, with VIRTIO_F_SWIOTLB and a
/// region of its own in a BAR, and relays its queues to a vhost-user backend
/// that is given that region and nothing else. The region can also be a pool in
/// guest memory (--pool), and the device one of virtio-mmio then (--transport).
#[derive(Parser, Clone, Debug)]
#[command(name = "swiotlb-device", version)]
pub struct Args {
    /// vfio-user socket to listen on
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,

    /// vhost-user socket of the backend
    #[arg(long, value_name = "PATH")]
    pub backend: PathBuf,

    /// Device type: a name (blk, net, fs, scsi, rng, console, vsock...) or a virtio ID
    #[arg(long = "type", value_name = "TYPE", value_parser = parse_type, default_value = "blk")]
    pub device_type: DeviceType,

    /// Length of the region in bytes, with suffix K, M or G if wanted [default: 16M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub region_size: Option<u64>,

    /// Where in its BAR the region begins [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub region_offset: Option<u64>,

    /// Work in a pool in guest memory instead of a region of the device's own: its
    /// guest-physical address and its length, such as 0x5d000000+16M. QEMU has to have it
    /// as a memory-backend-memfd of its own with share=on
    #[arg(long, value_name = "START+BYTES", value_parser = parse_pool)]
    pub pool: Option<Window>,

    /// How drivers reach the device: virtio over PCI, or over MMIO: the registers in BAR 0
    /// of a function that is no virtio device by itself (1b36:00aa), with one interrupt;
    /// only with --pool
    #[arg(long, value_name = "pci|mmio", value_parser = parse_transport, default_value = "pci")]
    pub transport: Transport,

    /// What restricts drivers to the region: VIRTIO_F_SWIOTLB (bit 27, bus addresses),
    /// VIRTIO_F_DMB (bit 44, which is provisional; offsets), or one of them as they like
    #[arg(long, value_name = "swiotlb|dmb|both", value_parser = parse_dialect, default_value = "swiotlb")]
    pub dialect: Dialect,

    /// Whether FEATURES_OK is refused when no feature of the dialect was accepted
    #[arg(long, value_name = "required|optional", value_parser = parse_mode, default_value = "required")]
    pub mode: Mode,

    /// Offer VIRTIO_F_SWIOTLB (bit 27) if the dialect has it
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "yes")]
    pub offer_swiotlb: bool,

    /// Present the capabilities of the dialect, which name the region [default: yes]
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no)]
    pub capability: Option<bool>,

    /// Offer VIRTIO_F_ACCESS_PLATFORM (bit 33); always with VIRTIO_F_DMB
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
    /// configuration space (--config), 36, the platform's order, or 40, a queue's reset
    #[arg(long, value_name = "N[+N]...", value_parser = parse_bits, default_value = "")]
    pub add_features: u64,

    /// Feature bits of the backend that are not offered
    #[arg(long, value_name = "N[+N]...", value_parser = parse_bits, default_value = "")]
    pub hide_features: u64,

    /// Take guest memory that a client shares, and use it: for benchmarks that
    /// compare with direct DMA, and nothing else
    #[arg(long, value_name = "yes|no", action = ArgAction::Set, value_parser = parse_yes_no, default_value = "no")]
    pub allow_guest_memory: bool,

    /// How many milliseconds a reset waits for requests that the backend has taken
    #[arg(long, value_name = "MS", default_value = "1000")]
    pub drain: u16,

    /// Number of virtqueues [default: the fewest that the type can have]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub queues: Option<u16>,

    /// How many of the virtqueues, the last, the backend does not know: what the
    /// driver puts there stays there
    #[arg(long, value_name = "N", default_value = "0")]
    pub idle_queues: u16,

    /// Largest size of a virtqueue, a power of two
    #[arg(long, value_name = "N", default_value = "256")]
    pub queue_size: u16,

    /// Bytes of configuration space to ask the backend for [default: by type]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_CONFIG_SPACE)))]
    pub config_size: Option<u32>,

    /// Configuration space in hexadecimal, for a backend that offers none
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    pub config: Option<HexBytes>,

    /// Bytes, in hexadecimal, that must never be in the region: it is searched for
    /// them all the time (more than one with commas)
    #[arg(long, value_name = "HEX", value_parser = parse_pattern, value_delimiter = ',')]
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

/// A newtype, so that clap takes a vector as one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HexBytes(pub Vec<u8>);

impl TryFrom<&Args> for DeviceConfig {
    type Error = ConfigError;

    /// What the command line says of the device; the program keeps the rest.
    fn try_from(args: &Args) -> Result<Self, ConfigError> {
        let device_type = args.device_type;
        let usual = Self::new(device_type);
        let of_region = [
            (args.region_size.is_some(), "--region-size"),
            (args.region_offset.is_some(), "--region-offset"),
            (args.capability.is_some(), "--capability"),
        ];
        let given = of_region.into_iter().find(|(is_given, _)| *is_given);
        if let (Some(_), Some((_, option))) = (args.pool, given) {
            return Err(ConfigError::PoolExcludes(option));
        }
        let mut config = Self {
            device_type,
            region_size: args.region_size.unwrap_or(usual.region_size),
            region_offset: args.region_offset.unwrap_or(usual.region_offset),
            pool: None,
            transport: args.transport,
            dialect: args.dialect,
            capability: args.capability.unwrap_or(usual.capability),
            mode: args.mode,
            offer: Offer {
                added: args.add_features,
                hidden: args.hide_features,
                swiotlb: args.offer_swiotlb,
                access_platform: args.access_platform,
                packed: args.packed,
                indirect: args.indirect,
                event_idx: args.event_idx,
            },
            allow_guest_memory: args.allow_guest_memory,
            queues: args.queues.unwrap_or(device_type.queues),
            idle_queues: args.idle_queues,
            queue_size: args.queue_size,
            config_space: args.config.as_ref().map(|bytes| bytes.0.clone()),
            config_space_size: args.config_size.unwrap_or(device_type.config_size),
            drain: Duration::from_millis(args.drain.into()),
        };
        if let Some(pool) = args.pool {
            config.use_pool(pool);
        }
        config.validate()?;
        Ok(config)
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

fn parse_transport(text: &str) -> Result<Transport, String> {
    match text {
        "pci" => Ok(Transport::Pci),
        "mmio" => Ok(Transport::Mmio),
        _ => Err("say pci or mmio".into()),
    }
}

fn parse_dialect(text: &str) -> Result<Dialect, String> {
    match text {
        "swiotlb" => Ok(Dialect::Swiotlb),
        "dmb" => Ok(Dialect::Dmb),
        "both" => Ok(Dialect::Both),
        _ => Err("say swiotlb, dmb or both".into()),
    }
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    match text {
        "required" => Ok(Mode::Required),
        "optional" => Ok(Mode::Optional),
        _ => Err("say required or optional".into()),
    }
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

/// An address and a length, with + between them.
pub fn parse_pool(text: &str) -> Result<Window, String> {
    let both = text.split_once('+');
    let sizes = both.map(|(start, bytes)| (parse_size(start), parse_size(bytes)));
    match sizes {
        Some((Ok(base), Ok(len))) => Ok(Window { base, len }),
        _ => Err("not an address and a length such as 0x5d000000+16M".into()),
    }
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

fn parse_pattern(text: &str) -> Result<HexBytes, String> {
    let pattern = parse_hex(text)?;
    match pattern.0.len() {
        FEWEST_WATCHED.. => Ok(pattern),
        _ => Err(format!("less than {FEWEST_WATCHED} bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::error::ErrorKind;
    use clap::CommandFactory;

    fn parse(more: &[&str]) -> Result<Args, clap::Error> {
        let mut args = vec!["swiotlb-device", "--socket", "a", "--backend", "b"];
        args.extend(more);
        Args::try_parse_from(args)
    }

    fn config(more: &[&str]) -> Result<DeviceConfig, ConfigError> {
        DeviceConfig::try_from(&parse(more).expect("arguments"))
    }

    #[test]
    fn clap_is_content() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_library() {
        for kind in ["blk", "scsi"] {
            let device_type = types::lookup(kind).expect("a type");
            let config = config(&["--type", kind]);
            assert_eq!(config, Ok(DeviceConfig::new(device_type)));
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused = config(&["--region-size", "100"]);
        assert_eq!(refused, Err(ConfigError::RegionSize(100)));
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
    fn pools() {
        let pool = config(&["--pool", "0x5d000000+16M"]).expect("a device");
        assert_eq!((pool.pool, pool.region_size), (Some(0x5d00_0000), 16 << 20));
        assert!(!pool.capability && pool.bounce_bar_size().is_none());
        let decimal = config(&["--pool", "4096+0x2000"]).expect("a device");
        assert_eq!((decimal.pool, decimal.region_size), (Some(4096), 8192));
        for bad in [
            "",
            "+",
            "4096",
            "4096+",
            "+4096",
            "4096+8192+1",
            "x+4096",
            "4096-1M",
        ] {
            assert!(parse(&["--pool", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pool_excludes_what_is_of_a_region() {
        for (option, value, name) in [
            ("--region-size", "16M", "--region-size"),
            ("--region-offset", "0", "--region-offset"),
            ("--capability", "no", "--capability"),
            ("--dialect", "both", "--dialect dmb or both"),
            ("--allow-guest-memory", "yes", "--allow-guest-memory"),
        ] {
            let refused = config(&["--pool", "1G+16M", option, value]);
            assert_eq!(refused, Err(ConfigError::PoolExcludes(name)), "{option}");
        }
    }

    #[test]
    fn transports() {
        let mmio = config(&["--pool", "1G+16M", "--transport", "mmio"]);
        assert_eq!(mmio.map(|config| config.transport), Ok(Transport::Mmio));
        let alone = config(&["--transport", "mmio"]);
        assert_eq!(alone, Err(ConfigError::MmioRegion));
        assert!(parse(&["--transport", "ccw"]).is_err());
    }

    #[test]
    fn hex() {
        assert_eq!(parse_hex("00ff"), Ok(HexBytes(vec![0, 255])));
        assert!(parse_hex("0").is_err());
        assert!(parse_hex("zz").is_err());
    }

    #[test]
    fn modes() {
        let optional = config(&["--mode", "optional"]);
        assert_eq!(optional.map(|config| config.mode), Ok(Mode::Optional));
        assert!(parse(&["--mode", "maybe"]).is_err());
    }

    #[test]
    fn dialects() {
        for (word, dialect) in [
            ("swiotlb", Dialect::Swiotlb),
            ("dmb", Dialect::Dmb),
            ("both", Dialect::Both),
        ] {
            let parsed = config(&["--dialect", word]);
            assert_eq!(parsed.map(|config| config.dialect), Ok(dialect));
        }
        assert!(parse(&["--dialect", "none"]).is_err());
    }

    #[test]
    fn feature_bits() {
        assert_eq!(parse_bits(""), Ok(0));
        assert_eq!(parse_bits("3+5+63"), Ok(0x8000_0000_0000_0028));
        for bad in ["64", "-1", "3,5", "x"] {
            assert!(parse_bits(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns() {
        let args = parse(&["--watch", "00112233,445566778899"]).expect("arguments");
        assert_eq!(args.watch[1].0, [0x44, 0x55, 0x66, 0x77, 0x88, 0x99]);
        let short = parse(&["--watch", "00112233,445566"]).expect_err("too short");
        assert!(short.to_string().contains("less than 4 bytes"), "{short}");
    }

    #[test]
    fn it_has_no_faults() {
        for option in ["--fault=cap-empty", "--chaos=1", "--fault-after=1"] {
            let refused = parse(&[option]).expect_err(option);
            assert_eq!(refused.kind(), ErrorKind::UnknownArgument);
        }
    }

    #[test]
    fn queues_and_configuration_space_are_the_types_unless_given() {
        let given = config(&["--queues", "3", "--idle-queues", "1", "--config-size", "7"]);
        let given = given.expect("a device");
        assert_eq!((given.queues, given.served_queues()), (3, 2));
        assert_eq!((given.config_space_size, given.config_space), (7, None));
        let bytes = config(&["--config", "0102"]).map(|config| config.config_space);
        assert_eq!(bytes, Ok(Some(vec![1, 2])));
    }
}
