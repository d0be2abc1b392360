// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the program knows of a device type: its virtio ID, its PCI class, how
//! many queues it has, how long its configuration space is, and which errors it
//! has. Nothing else anywhere depends on the type.

use virtio_bindings::virtio_ids::{
    VIRTIO_ID_9P, VIRTIO_ID_BLOCK, VIRTIO_ID_CAN, VIRTIO_ID_CONSOLE, VIRTIO_ID_CRYPTO,
    VIRTIO_ID_FS, VIRTIO_ID_GPIO, VIRTIO_ID_GPU, VIRTIO_ID_I2C_ADAPTER, VIRTIO_ID_INPUT,
    VIRTIO_ID_NET, VIRTIO_ID_RNG, VIRTIO_ID_SCSI, VIRTIO_ID_SOUND, VIRTIO_ID_VSOCK,
};

use crate::failure::Failure;

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType {
    /// The name, for `--type` and messages.
    pub name: &'static str,
    /// virtio 1.4, section 5.
    pub id: u16,
    /// Class, subclass, programming interface.
    pub class: u32,
    /// Virtqueues when `--queues` does not say.
    pub queues: u16,
    /// Bytes of configuration space asked of the backend when `--config-size`
    /// does not say. Backends refuse to be asked for more than they have.
    pub config_size: u32,
    /// How requests fail when there is no backend; none if nobody answers them.
    pub failure: Option<Failure>,
}

const fn row(name: &'static str, id: u32, class: u32, queues: u16, config_size: u32) -> DeviceType {
    DeviceType {
        name,
        id: id as u16,
        class,
        queues,
        config_size,
        failure: None,
    }
}

impl DeviceType {
    const fn fails(self, failure: Failure) -> Self {
        Self {
            failure: Some(failure),
            ..self
        }
    }

    /// Whether the chains of a queue are requests, which a backend answers by itself. Others
    /// wait for what comes from elsewhere, such as a packet, or are read when there is time.
    pub fn answers(self, queue: u16) -> bool {
        match self.failure {
            Some(failure) => failure.answers(queue),
            None => matches!(self.name, "rng" | "9p" | "crypto" | "i2c"),
        }
    }
}

const TYPES: &[DeviceType] = &[
    row("net", VIRTIO_ID_NET, 0x02_0000, 2, 12),
    row("blk", VIRTIO_ID_BLOCK, 0x01_0000, 1, 60).fails(Failure::Blk),
    row("console", VIRTIO_ID_CONSOLE, 0x07_8000, 2, 12),
    row("rng", VIRTIO_ID_RNG, 0x00_ff00, 1, 0),
    row("scsi", VIRTIO_ID_SCSI, 0x01_0000, 3, 36).fails(Failure::Scsi),
    row("9p", VIRTIO_ID_9P, 0x00_0200, 1, 0),
    row("gpu", VIRTIO_ID_GPU, 0x03_8000, 2, 16),
    row("input", VIRTIO_ID_INPUT, 0x09_8000, 2, 136),
    row("vsock", VIRTIO_ID_VSOCK, 0x07_8000, 3, 8),
    row("crypto", VIRTIO_ID_CRYPTO, 0x10_8000, 2, 56),
    row("sound", VIRTIO_ID_SOUND, 0x04_0100, 4, 12),
    row("fs", VIRTIO_ID_FS, 0x01_8000, 2, 40).fails(Failure::Fs),
    row("i2c", VIRTIO_ID_I2C_ADAPTER, 0x0c_8000, 1, 0),
    row("can", VIRTIO_ID_CAN, 0x0c_0900, 3, 2),
    row("gpio", VIRTIO_ID_GPIO, 0x08_8000, 2, 8),
];

/// The type that goes by this name or virtio ID.
pub fn lookup(name: &str) -> Option<DeviceType> {
    if let Some(known) = TYPES.iter().find(|t| t.name == name) {
        return Some(*known);
    }
    let id: u16 = match name.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16).ok()?,
        None => name.parse().ok()?,
    };
    // PCI device IDs 0x1040..=0x107f are all that modern devices have.
    if !(1..=0x3f).contains(&id) {
        return None;
    }
    let known = TYPES.iter().find(|t| t.id == id).copied();
    Some(known.unwrap_or(row("other", id.into(), 0x00_ff00, 1, 0)))
}

/// All names, for messages.
pub fn names() -> String {
    TYPES.iter().map(|t| t.name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(lookup("blk").map(|t| t.id), Some(2));
        assert_eq!(lookup("2").map(|t| t.name), Some("blk"));
        assert_eq!(lookup("0x1a").map(|t| t.name), Some("fs"));
        assert_eq!(lookup("63").map(|t| t.name), Some("other"));
    }

    #[test]
    fn queues_of_requests() {
        let answers = |name, queue| lookup(name).map(|t| t.answers(queue));
        assert_eq!(answers("blk", 3), Some(true));
        assert_eq!(
            [0, 1, 2].map(|n| answers("scsi", n)),
            [true, false, true].map(Some)
        );
        assert_eq!(answers("rng", 0), Some(true));
        assert_eq!(answers("net", 0), Some(false));
        assert_eq!(answers("63", 0), Some(false));
    }

    #[test]
    fn nonsense_is_no_type() {
        for name in ["", "0", "64", "disk", "0x", "-1"] {
            assert_eq!(lookup(name), None, "{name}");
        }
    }
}
