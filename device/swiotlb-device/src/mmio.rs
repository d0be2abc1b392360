// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The registers of virtio-mmio, version 2 (virtio 1.4, 4.2.2), in a BAR. Pure: an access in,
//! what it stands for out.
//!
//! Most registers are fields of the common configuration structure of virtio-pci in another
//! place, so that there is one state machine for both ([`Registers`](crate::virtio::Registers)).
//! All registers have 32 bits: an access of another width, or beside one, reads 0 and does
//! nothing. So does a write of a value that the field has no room for.

/// Where the configuration space of the device type begins.
pub const CONFIG_OFFSET: u64 = 0x100;

/// Bit of InterruptStatus: the device has used a buffer.
pub const INTERRUPT_USED: u32 = 1;
/// Bit of InterruptStatus: the configuration has changed, or the device needs a reset.
pub const INTERRUPT_CONFIG: u32 = 2;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// That of the virtio devices of virtio-pci.
const VENDOR: u32 = 0x1af4;

/// A field of the common configuration structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes, 4 at most.
    pub width: usize,
}

/// What a read of a register returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// Always this.
    Value(u32),
    /// A field of the common configuration structure.
    Common(Field),
    /// The ID of the device type.
    DeviceId,
    /// The largest size of the queue that is selected.
    QueueSizeMax,
    /// Why the driver is interrupted.
    InterruptStatus,
}

/// What a write to a register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Nothing.
    None,
    /// A value for a field of the common configuration structure.
    Common(Field, u32),
    /// To stop the queue that is selected.
    DisableQueue,
    /// A notification of this queue.
    Notify(u16),
    /// Bits of InterruptStatus that the driver has seen.
    Acknowledge(u32),
}

const fn field(offset: u64, width: usize) -> Field {
    Field { offset, width }
}

/// A read of `width` bytes from `offset` on, below [`CONFIG_OFFSET`].
pub fn read(offset: u64, width: usize) -> Read {
    if width != 4 {
        return Read::Value(0);
    }
    match offset {
        0x000 => Read::Value(MAGIC),
        0x004 => Read::Value(VERSION),
        0x008 => Read::DeviceId,
        0x00c => Read::Value(VENDOR),
        // DeviceFeatures
        0x010 => Read::Common(field(4, 4)),
        0x034 => Read::QueueSizeMax,
        // QueueReady
        0x044 => Read::Common(field(28, 2)),
        0x060 => Read::InterruptStatus,
        // Status
        0x070 => Read::Common(field(20, 1)),
        // SHMLenLow to SHMBaseHigh: there is no shared memory.
        0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => Read::Value(u32::MAX),
        // QueueReset
        0x0c0 => Read::Common(field(58, 2)),
        // ConfigGeneration
        0x0fc => Read::Common(field(21, 1)),
        _ => Read::Value(0),
    }
}

/// A write from `offset` on, below [`CONFIG_OFFSET`].
pub fn write(offset: u64, data: &[u8]) -> Write {
    let Ok(bytes) = data.try_into() else {
        return Write::None;
    };
    let value = u32::from_le_bytes(bytes);
    let fits = |field: Field| match field.width {
        4 => true,
        width => value >> (8 * width) == 0,
    };
    let common = |field| match fits(field) {
        true => Write::Common(field, value),
        false => Write::None,
    };
    match offset {
        // DeviceFeaturesSel, DriverFeatures, DriverFeaturesSel
        0x014 => common(field(0, 4)),
        0x020 => common(field(12, 4)),
        0x024 => common(field(8, 4)),
        // QueueSel: a number without a queue selects none.
        0x030 => Write::Common(field(22, 2), value.min(u16::MAX.into())),
        // QueueSize
        0x038 => common(field(24, 2)),
        // QueueReady
        0x044 if value == 0 => Write::DisableQueue,
        0x044 => common(field(28, 2)),
        0x050 => u16::try_from(value).map_or(Write::None, Write::Notify),
        0x064 => Write::Acknowledge(value),
        // Status
        0x070 => common(field(20, 1)),
        // QueueDesc, QueueDriver, QueueDevice
        0x080 => common(field(32, 4)),
        0x084 => common(field(36, 4)),
        0x090 => common(field(40, 4)),
        0x094 => common(field(44, 4)),
        0x0a0 => common(field(48, 4)),
        0x0a4 => common(field(52, 4)),
        // QueueReset
        0x0c0 => common(field(58, 2)),
        _ => Write::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offset in virtio 1.4, 4.2.2, and where the same is in 4.1.4.3.
    const WRITTEN: [(u64, u64, usize); 14] = [
        (0x014, 0, 4),
        (0x020, 12, 4),
        (0x024, 8, 4),
        (0x030, 22, 2),
        (0x038, 24, 2),
        (0x044, 28, 2),
        (0x070, 20, 1),
        (0x080, 32, 4),
        (0x084, 36, 4),
        (0x090, 40, 4),
        (0x094, 44, 4),
        (0x0a0, 48, 4),
        (0x0a4, 52, 4),
        (0x0c0, 58, 2),
    ];
    const READ: [(u64, u64, usize); 5] = [
        (0x010, 4, 4),
        (0x044, 28, 2),
        (0x070, 20, 1),
        (0x0c0, 58, 2),
        (0x0fc, 21, 1),
    ];

    #[test]
    fn each_register_stands_for_a_field() {
        for (at, offset, width) in WRITTEN {
            let value = if width == 4 { 0x8000_0001 } else { 1 };
            let expected = Write::Common(Field { offset, width }, value);
            assert_eq!(write(at, &value.to_le_bytes()), expected, "{at:#x}");
        }
        for (at, offset, width) in READ {
            assert_eq!(
                read(at, 4),
                Read::Common(Field { offset, width }),
                "{at:#x}"
            );
        }
    }

    #[test]
    fn registers_of_its_own() {
        assert_eq!(read(0x000, 4), Read::Value(u32::from_le_bytes(*b"virt")));
        assert_eq!(read(0x004, 4), Read::Value(2));
        assert_eq!(read(0x008, 4), Read::DeviceId);
        assert_eq!(read(0x00c, 4), Read::Value(0x1af4));
        assert_eq!(read(0x034, 4), Read::QueueSizeMax);
        assert_eq!(read(0x060, 4), Read::InterruptStatus);
        // No shared memory, whatever SHMSel selects.
        assert_eq!(write(0x0ac, &[0; 4]), Write::None);
        for at in [0x0b0, 0x0b4, 0x0b8, 0x0bc] {
            assert_eq!(read(at, 4), Read::Value(u32::MAX));
        }
        assert_eq!(write(0x044, &[0; 4]), Write::DisableQueue);
        assert_eq!(write(0x050, &[3, 1, 0, 0]), Write::Notify(0x103));
        assert_eq!(write(0x064, &[3, 0, 0, 0]), Write::Acknowledge(3));
    }

    #[test]
    fn all_else_is_nothing() {
        let written = WRITTEN.map(|(at, ..)| at);
        let read_from = READ.map(|(at, ..)| at);
        for at in 0..CONFIG_OFFSET {
            let is_own = [0x050, 0x064].contains(&at);
            if !is_own && !written.contains(&at) {
                assert_eq!(write(at, &[1, 0, 0, 0]), Write::None, "{at:#x}");
            }
            let own = [0, 4, 8, 0xc, 0x34, 0x60, 0xb0, 0xb4, 0xb8, 0xbc];
            if !own.contains(&at) && !read_from.contains(&at) {
                assert_eq!(read(at, 4), Read::Value(0), "{at:#x}");
            }
            for width in [0, 1, 2, 3, 5, 8, 64] {
                assert_eq!(write(at, &[0; 64][..width]), Write::None);
                assert_eq!(read(at, width), Read::Value(0));
            }
        }
    }

    #[test]
    fn values_without_room_do_nothing() {
        // 0x100 is no reset, 0x10000 no queue 0.
        for (at, value) in [
            (0x070, 0x100u32),
            (0x070, u32::MAX),
            (0x038, 0x1_0000),
            (0x044, 0x1_0000),
            (0x044, 0x1_0001),
            (0x050, 0x1_0000),
            (0x0c0, 0x1_0001),
        ] {
            assert_eq!(write(at, &value.to_le_bytes()), Write::None, "{at:#x}");
        }
        let none = Write::Common(field(22, 2), 0xffff);
        assert_eq!(write(0x030, &0x1_0000u32.to_le_bytes()), none);
        assert_eq!(write(0x030, &u32::MAX.to_le_bytes()), none);
    }
}
