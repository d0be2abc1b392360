// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device of some type may not say of itself, because its queues cannot keep it: features
//! and counts of queues that the backend does not serve, and requests that no queue can hold.
//! Drivers rely on it: virtio_net waits for a control queue with a CPU, and virtio_blk repeats
//! a request for ever that the ring has no room for.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_CRYPTO, VIRTIO_ID_FS, VIRTIO_ID_GPIO,
    VIRTIO_ID_NET, VIRTIO_ID_SCSI,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_DEVICE_STATS, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_NOTF_COAL, VIRTIO_NET_F_RSS, VIRTIO_NET_F_VQ_NOTF_COAL,
};

use crate::virtio::bit;

const NET: u16 = VIRTIO_ID_NET as u16;
const BLK: u16 = VIRTIO_ID_BLOCK as u16;
const CONSOLE: u16 = VIRTIO_ID_CONSOLE as u16;
const SCSI: u16 = VIRTIO_ID_SCSI as u16;
const CRYPTO: u16 = VIRTIO_ID_CRYPTO as u16;
const FS: u16 = VIRTIO_ID_FS as u16;
const GPIO: u16 = VIRTIO_ID_GPIO as u16;

/// VIRTIO_NET_F_HASH_TUNNEL (virtio 1.4, 5.1.3).
const NET_F_HASH_TUNNEL: u32 = 51;
/// Several pairs of queues, of which the control queue says how many are used.
const NET_PAIRS: u64 = bit(VIRTIO_NET_F_MQ) | bit(VIRTIO_NET_F_RSS);
/// What is said through the control queue (virtio 1.4, 5.1.3.1): offloads, the filters of
/// received packets, announcements, the MAC address, statistics, hashes, coalescing.
const NET_CONTROL: u64 = NET_PAIRS
    | bit(VIRTIO_NET_F_CTRL_VQ)
    | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    | bit(VIRTIO_NET_F_CTRL_RX)
    | bit(VIRTIO_NET_F_CTRL_VLAN)
    | bit(VIRTIO_NET_F_CTRL_RX_EXTRA)
    | bit(VIRTIO_NET_F_GUEST_ANNOUNCE)
    | bit(VIRTIO_NET_F_CTRL_MAC_ADDR)
    | bit(VIRTIO_NET_F_DEVICE_STATS)
    | bit(NET_F_HASH_TUNNEL)
    | bit(VIRTIO_NET_F_VQ_NOTF_COAL)
    | bit(VIRTIO_NET_F_NOTF_COAL)
    | bit(VIRTIO_NET_F_HASH_REPORT);
const NET_MAX_PAIRS: usize = 8;

const CONSOLE_F_MULTIPORT: u32 = 1;
const CONSOLE_MAX_PORTS: usize = 4;

const GPIO_F_IRQ: u32 = 0;

const BLK_SEG_MAX: usize = 12;
const BLK_NUM_QUEUES: usize = 34;

const SCSI_NUM_QUEUES: usize = 0;
const SCSI_SEG_MAX: usize = 4;
/// The queues for control and events.
const SCSI_OTHERS: u16 = 2;

const FS_NUM_QUEUES: usize = 36;
const CRYPTO_MAX_DATAQUEUES: usize = 4;

/// A request has a header and a status beside its data, a descriptor each.
const BESIDE_DATA: u16 = 2;

/// Fewest descriptors of a queue whose requests have data.
pub fn least_queue_size(id: u16) -> u16 {
    match id {
        BLK | SCSI => BESIDE_DATA + 1,
        _ => 1,
    }
}

/// Which of `features` need queues beyond the `served` first.
pub fn unserved(id: u16, features: u64, served: u16, config: &[u8]) -> u64 {
    let served = u32::from(served);
    match id {
        NET => {
            let pairs = field::<2>(config, NET_MAX_PAIRS).map(u16::from_le_bytes);
            let has_pairs = pairs.is_some_and(|pairs| served > 2 * u32::from(pairs));
            let pairs = if has_pairs { 0 } else { NET_PAIRS };
            // With one pair, the control queue is the third.
            let control = if served > 2 { 0 } else { NET_CONTROL };
            features & (pairs | control)
        }
        CONSOLE => {
            let ports = field::<4>(config, CONSOLE_MAX_PORTS).map(u32::from_le_bytes);
            let has_ports = ports.is_some_and(|ports| served / 2 > ports);
            features
                & if has_ports {
                    0
                } else {
                    bit(CONSOLE_F_MULTIPORT)
                }
        }
        GPIO if served < 2 => features & bit(GPIO_F_IRQ),
        _ => 0,
    }
}

/// Makes the configuration space say no more than the queues can keep, of which `served` are
/// there. `room` is what the shortest queue of requests holds, if a request may not have a
/// table of its own.
pub fn lower(id: u16, config: &mut [u8], features: u64, served: u16, room: Option<u16>) {
    let segments = room.map(|room| room.saturating_sub(BESIDE_DATA).max(1));
    match id {
        BLK => {
            if features & bit(VIRTIO_BLK_F_MQ) != 0 {
                lower_u16(config, BLK_NUM_QUEUES, served);
            }
            if let Some(segments) = segments.filter(|_| features & bit(VIRTIO_BLK_F_SEG_MAX) != 0) {
                lower_u32(config, BLK_SEG_MAX, segments.into());
            }
        }
        SCSI => {
            let queues = served.saturating_sub(SCSI_OTHERS).max(1);
            lower_u32(config, SCSI_NUM_QUEUES, queues.into());
            if let Some(segments) = segments {
                lower_u32(config, SCSI_SEG_MAX, segments.into());
            }
        }
        // Beside them there is one queue more, of higher priority or for control.
        FS => lower_u32(
            config,
            FS_NUM_QUEUES,
            served.saturating_sub(1).max(1).into(),
        ),
        CRYPTO => {
            let queues = served.saturating_sub(1).max(1);
            lower_u32(config, CRYPTO_MAX_DATAQUEUES, queues.into());
        }
        _ => {}
    }
}

/// Whether a queue is among those whose length limits a request.
pub fn has_segments(id: u16, queue: u16) -> bool {
    match id {
        BLK => true,
        SCSI => queue >= SCSI_OTHERS,
        _ => false,
    }
}

fn field<const N: usize>(config: &[u8], at: usize) -> Option<[u8; N]> {
    config.get(at..at + N)?.try_into().ok()
}

fn lower_u16(config: &mut [u8], at: usize, most: u16) {
    if let Some(value) = field(config, at).map(u16::from_le_bytes) {
        config[at..at + 2].copy_from_slice(&value.min(most).to_le_bytes());
    }
}

fn lower_u32(config: &mut [u8], at: usize, most: u32) {
    if let Some(value) = field(config, at).map(u32::from_le_bytes) {
        config[at..at + 4].copy_from_slice(&value.min(most).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    /// Configuration space whose fields all say 200.
    fn config(width: usize) -> Vec<u8> {
        (0..60)
            .map(|n| if n % width == 0 { 200 } else { 0 })
            .collect()
    }

    fn lowered(id: u16, width: usize, served: u16, room: Option<u16>, at: usize) -> u8 {
        let mut config = config(width);
        lower(id, &mut config, ALL, served, room);
        config[at]
    }

    #[test]
    fn a_control_queue_that_is_not_served_is_not_offered() {
        let mac = bit(5);
        let one_pair = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(unserved(NET, NET_CONTROL | mac, 2, &one_pair), NET_CONTROL);
        assert_eq!(unserved(NET, NET_CONTROL | mac, 2, &[]), NET_CONTROL);
        assert_eq!(unserved(NET, NET_CONTROL | mac, 3, &one_pair), 0);
        assert_eq!(unserved(NET, mac, 2, &[]), 0);
    }

    #[test]
    fn pairs_that_are_not_served_are_not_offered() {
        let four_pairs = [0, 0, 0, 0, 0, 0, 0, 0, 4, 0];
        assert_eq!(unserved(NET, NET_CONTROL, 8, &four_pairs), NET_PAIRS);
        assert_eq!(unserved(NET, NET_CONTROL, 9, &four_pairs), 0);
        // Where nothing says how many there are.
        assert_eq!(unserved(NET, NET_CONTROL, 3, &[]), NET_PAIRS);
    }

    #[test]
    fn other_queues_that_are_not_served_are_not_offered() {
        let two_ports = [0, 0, 0, 0, 2, 0, 0, 0];
        assert_eq!(unserved(CONSOLE, 3, 2, &two_ports), 2);
        assert_eq!(unserved(CONSOLE, 3, 6, &two_ports), 0);
        assert_eq!(unserved(CONSOLE, 3, 6, &[]), 2);
        assert_eq!(unserved(GPIO, 1, 1, &[]), 1);
        assert_eq!(unserved(GPIO, 1, 2, &[]), 0);
        assert_eq!(unserved(BLK, ALL, 1, &[]), 0);
    }

    #[test]
    fn a_request_is_no_longer_than_its_queue() {
        assert_eq!(lowered(BLK, 4, 1, Some(64), BLK_SEG_MAX), 62);
        assert_eq!(lowered(SCSI, 4, 3, Some(64), SCSI_SEG_MAX), 62);
        for (id, at) in [(BLK, BLK_SEG_MAX), (SCSI, SCSI_SEG_MAX)] {
            assert_eq!(lowered(id, 4, 3, Some(1024), at), 200);
            assert_eq!(lowered(id, 4, 3, None, at), 200);
            assert_eq!(lowered(id, 4, 3, Some(2), at), 1);
        }
        let mut without = config(4);
        lower(BLK, &mut without, 0, 1, Some(64));
        assert_eq!(without, config(4), "the field means nothing");
    }

    #[test]
    fn no_more_queues_than_there_are() {
        assert_eq!(lowered(BLK, 2, 4, None, BLK_NUM_QUEUES), 4);
        assert_eq!(lowered(SCSI, 4, 6, None, SCSI_NUM_QUEUES), 4);
        assert_eq!(lowered(FS, 4, 3, None, FS_NUM_QUEUES), 2);
        assert_eq!(lowered(CRYPTO, 4, 3, None, CRYPTO_MAX_DATAQUEUES), 2);
    }

    #[test]
    fn short_configuration_spaces_stay() {
        for id in 0..64 {
            for length in 0..60 {
                let mut short = config(1)[..length].to_vec();
                lower(id, &mut short, ALL, 1, Some(2));
                assert_eq!(short.len(), length);
                unserved(id, ALL, 1, &short);
            }
        }
    }
}
