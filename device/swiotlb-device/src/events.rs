// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The events of the report. Each is one JSON object: `event` names the
//! variant, and the other keys are the variant's fields. report.schema.json
//! is made from this file.

use device_program::sandbox::Entered;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::backend::Share;
use crate::ring::Window;
use crate::virtio::bits;

/// An address or a feature set: "0x..." in JSON, whose numbers end at 2^53.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Hex(#[cfg_attr(test, schemars(with = "String"))] pub u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

/// A feature set, as a mask and as bit numbers.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Features {
    /// The mask.
    pub features: Hex,
    /// The numbers of the bits that are set.
    pub bits: Vec<u32>,
}

impl From<u64> for Features {
    fn from(features: u64) -> Self {
        Self {
            features: Hex(features),
            bits: bits(features),
        }
    }
}

/// A window of guest memory.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct GuestWindow {
    /// Its address, in the form that descriptors have it.
    pub guest: Hex,
    /// Its length.
    pub bytes: u64,
}

impl From<Window> for GuestWindow {
    fn from(window: Window) -> Self {
        Self {
            guest: Hex(window.base),
            bytes: window.len,
        }
    }
}

/// An entry of the backend's memory table.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TableEntry {
    /// Where the guest sees it.
    #[serde(flatten)]
    pub window: GuestWindow,
    /// Where it begins in its file, in bytes.
    pub offset: u64,
    /// The inode of its file.
    pub inode: u64,
}

impl From<&Share<'_>> for TableEntry {
    fn from(share: &Share<'_>) -> Self {
        Self {
            window: share.window.into(),
            offset: share.offset,
            inode: share.inode,
        }
    }
}

/// A mapping of the backend's process.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BackendMapping {
    /// The path of the mapped file, as /proc has it.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// The inode of the file.
    pub inode: u64,
    /// Whether the file is the region.
    pub region: bool,
}

/// What was reset.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ResetKind {
    /// The virtio device: the driver wrote 0 to the status register.
    Status,
    /// The PCI function: the VMM asked for it.
    Function,
}

/// When the device looks at the backend's memory.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum When {
    /// The backend has got its queues.
    Start,
    /// The backend is about to lose its queues.
    Stop,
}

/// How the device was started: its options, and what follows from them.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Start {
    /// The version of the program.
    pub version: &'static str,
    /// The process ID of the device.
    pub pid: u32,
    /// The path of the vfio-user socket.
    pub socket: String,
    /// The path of the backend's socket.
    pub backend: String,
    /// The name of the device type, or "other".
    pub r#type: &'static str,
    /// The virtio ID of the device type.
    pub virtio_id: u16,
    /// The length of the region.
    pub region_bytes: u64,
    /// Where the region begins in its BAR, in bytes.
    pub region_offset: u64,
    /// The length of the region's BAR; 0 if there is none.
    pub bar_bytes: u64,
    /// The guest-physical address of the pool that is the region; null if the region is the
    /// device's own.
    pub pool: Option<Hex>,
    /// `--transport`: "pci" or "mmio".
    pub transport: String,
    /// `--dialect`: "swiotlb", "dmb" or "both".
    pub dialect: String,
    /// `--mode`: "required" or "optional".
    pub mode: String,
    /// Whether VIRTIO_F_SWIOTLB is offered.
    pub offer_swiotlb: bool,
    /// Whether there are capabilities that name the region.
    pub capability: bool,
    /// Whether VIRTIO_F_ACCESS_PLATFORM is offered.
    pub access_platform: bool,
    /// Whether VIRTIO_F_RING_PACKED is offered.
    pub packed: bool,
    /// Whether VIRTIO_F_INDIRECT_DESC is offered if the backend has it.
    pub indirect: bool,
    /// Whether VIRTIO_F_EVENT_IDX is offered if the backend has it.
    pub event_idx: bool,
    /// Whether the device takes guest memory that a client shares.
    pub allow_guest_memory: bool,
    /// The number of virtqueues.
    pub queues: u16,
    /// The largest size of a virtqueue.
    pub queue_size: u16,
    /// How long a reset waits for the backend's answers, in milliseconds.
    pub drain: u16,
    /// Whether the device enters a sandbox.
    pub sandbox: bool,
    /// The bytes of `--watch`, in hexadecimal.
    pub watch: Vec<String>,
}

/// What happens to the device.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The program began.
    Start(Start),
    /// The program entered its sandbox.
    Sandbox(Entered),
    /// The watcher saw a pattern at a place for the first time.
    Watch {
        /// The number of the pattern in `--watch`, from 0.
        pattern: usize,
        /// Where it begins in the region, in bytes.
        offset: usize,
        /// The number of the watcher's pass, from 1.
        pass: u64,
    },
    /// A session began, and the device's hooks have something to say of it.
    Session {
        /// What they say, which depends on the hooks.
        hooks: Value,
        /// The number of the negotiation before.
        negotiation: u64,
    },
    /// The device connected to the backend.
    Backend {
        /// All that the backend offers.
        #[serde(flatten)]
        features: Features,
        /// The process ID of the backend; null if it is unknown.
        pid: Option<i32>,
        /// The length of the configuration space.
        config_bytes: usize,
    },
    /// A client connected.
    Connect,
    /// One kind of event is left out until another client connects.
    Omitted {
        /// The name of the event.
        what: String,
    },
    /// A client announced a window of guest memory.
    DmaMap {
        /// The bus address.
        addr: Hex,
        /// The length in bytes.
        size: Hex,
        /// Whether a file descriptor came along.
        fd: bool,
        /// Whether the device took the window, as its pool.
        pool: bool,
        /// Why the device does not take the window although guest memory is allowed, or
        /// although it has a pool to wait for; null for windows without a file descriptor
        /// that have nothing of the pool.
        refused: Option<String>,
    },
    /// A client took a window of guest memory away.
    DmaUnmap {
        /// The bus address.
        addr: Hex,
        /// The length in bytes.
        size: Hex,
    },
    /// The driver set FEATURES_OK; this is what it was offered.
    Offered {
        /// The features that the device offers.
        #[serde(flatten)]
        features: Features,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The driver set FEATURES_OK; this is what it asked for.
    Accepted {
        /// The features that the driver accepted.
        #[serde(flatten)]
        features: Features,
        /// Whether VIRTIO_F_SWIOTLB is among them.
        swiotlb: bool,
        /// Whether VIRTIO_F_DMB is among them.
        dmb: bool,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The device did not let the driver set FEATURES_OK.
    FeaturesRefused {
        /// What is wrong with the accepted features.
        reason: &'static str,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The driver set DRIVER_OK.
    DriverOk {
        /// The bus address of the region's BAR; null if the BAR has none, or there is no BAR.
        bar: Option<Hex>,
        /// The first address that points into the region: its bus address, null if the BAR
        /// has none or the pool has not come, or the least offset with VIRTIO_F_DMB.
        region: Option<Hex>,
        /// The number of bytes there: all of the region, but for its first page with
        /// VIRTIO_F_DMB.
        region_bytes: u64,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The device mapped guest memory, with `--allow-guest-memory` at DRIVER_OK.
    GuestMemory {
        /// What the backend gets of guest memory.
        windows: Vec<TableEntry>,
        /// What the backend's table has no room for.
        left_out: Vec<GuestWindow>,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The driver enabled a queue.
    Queue {
        /// The number of the queue.
        index: u16,
        /// The number of its descriptors.
        size: u16,
        /// Whether it is a packed ring.
        packed: bool,
        /// The address of the descriptor area.
        desc: Hex,
        /// The address of the driver area.
        avail: Hex,
        /// The address of the device area.
        used: Hex,
        /// Whether all three lie in the region.
        inside: bool,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The driver reset a single queue, or with virtio-mmio disabled it.
    QueueReset {
        /// The number of the queue.
        index: u16,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// A driver gave an address outside the region.
    Violation {
        /// The number of the queue.
        queue: u16,
        /// Where the address stands: "ring" (the registers of a queue), "descriptor"
        /// or "indirect" (the descriptor of an indirect table).
        kind: &'static str,
        /// The area of a ring (0 desc, 1 avail, 2 used), or the descriptor in its ring.
        index: u16,
        /// The descriptor in the indirect table; null if there is no table.
        entry: Option<u32>,
        /// The address.
        addr: Hex,
        /// The number of bytes from there on.
        len: u64,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// A driver made a chain or an index available that cannot be.
    Malformed {
        /// The number of the queue.
        queue: u16,
        /// The first descriptor of the chain, or the entry of the available ring.
        index: u16,
        /// What is wrong.
        what: &'static str,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The device looked at what the backend can reach.
    BackendMemory {
        /// When it looked.
        when: When,
        /// The memory table that the backend got.
        table: Vec<TableEntry>,
        /// The process ID of the backend; null if it is unknown.
        pid: Option<i32>,
        /// All shared mappings of the backend, and all of memory files; null if they
        /// are unknown.
        mappings: Option<Vec<BackendMapping>>,
        /// The number of mappings of memory other than the region; null if it is unknown.
        foreign: Option<u64>,
        /// Why the mappings are unknown; null if they are known.
        unknown: Option<String>,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The backend announced a change of its configuration space.
    ConfigChanged {
        /// The whole configuration space, in hexadecimal.
        config: String,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The device set DEVICE_NEEDS_RESET.
    NeedsReset {
        /// Why.
        reason: String,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The device lost its backend, or gave it up.
    BackendGone {
        /// Why.
        reason: String,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// A queue stopped before the backend had answered all requests.
    Undrained {
        /// The number of the queue.
        queue: u16,
        /// The number of requests without an answer; null if it is not certain.
        requests: Option<usize>,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The device or its PCI function was reset.
    Reset {
        /// Which of the two.
        kind: ResetKind,
        /// The number of the negotiation.
        negotiation: u64,
    },
    /// The client disconnected.
    Disconnect(Totals),
    /// The program ends. This is the last line.
    Summary(Totals),
}

impl Event {
    /// The name of the event in the report, such as "needs_reset".
    pub fn name(&self) -> String {
        let fields = serde_json::to_value(self).unwrap_or_default();
        fields["event"].as_str().unwrap_or_default().into()
    }
}

/// All counters, and what they were counted with.
#[derive(Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Totals {
    /// All counters so far.
    #[serde(flatten)]
    pub counters: Counters,
    /// Whether guest memory is allowed. It stands beside the counters so that nobody
    /// takes the report of such a device for one of a restricted device.
    pub allow_guest_memory: bool,
}

/// What the device counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Counters {
    /// Clients that connected.
    pub connections: u64,
    /// Times that a driver set FEATURES_OK.
    pub negotiations: u64,
    /// Negotiations in which the device did not accept FEATURES_OK.
    pub features_refused: u64,
    /// Resets of the device and of its PCI function.
    pub resets: u64,
    /// Notifications of the driver.
    pub kicks: u64,
    /// Chains that were checked, before the backend used them or after.
    pub chains_checked: u64,
    /// Chains that the backend used before they were checked.
    pub chains_late: u64,
    /// Chains that were gone before they could be checked.
    pub chains_lost: u64,
    /// Descriptors in the chains that were checked.
    pub descriptors_checked: u64,
    /// Bytes that the device may read, of the chains that were not late.
    pub bytes_readable: u64,
    /// Bytes that the device may write, of the chains that were not late.
    pub bytes_writable: u64,
    /// Addresses outside the region.
    pub violations: u64,
    /// Findings in chains that were late: their memory may have been used anew.
    pub suspects: u64,
    /// Chains and indices that cannot be.
    pub malformed: u64,
    /// Times that the device set DEVICE_NEEDS_RESET.
    pub needs_resets: u64,
    /// Changes of the configuration space that the backend announced.
    pub config_changes: u64,
    /// DMA_MAP messages.
    pub dma_maps: u64,
    /// DMA_MAP messages with a file descriptor.
    pub dma_map_fds: u64,
    /// DMA_MAP messages whose file descriptor the device took, as that of its pool.
    pub dma_map_pools: u64,
    /// DMA_UNMAP messages.
    pub dma_unmaps: u64,
    /// Backends that the device lost or gave up.
    pub backend_losses: u64,
    /// Requests that the device itself answered, with errors.
    pub requests_failed: u64,
    /// Queues that stopped before all requests were answered.
    pub undrained: u64,
    /// The most mappings ever seen in a backend of memory other than the region.
    pub backend_foreign_mappings: u64,
    /// Times that the watcher went through the region.
    pub watch_passes: u64,
    /// Bytes that the watcher searched.
    pub watch_bytes: u64,
    /// Patterns that the watcher saw, each time anew.
    pub watch_hits: u64,
    /// The watcher's longest pass, in microseconds.
    pub watch_longest_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use device_program::sandbox::{Landlock, Sockets};
    use device_program::Line;
    use schemars::generate::SchemaSettings;
    use serde_json::json;
    use std::collections::{BTreeMap, BTreeSet};
    use std::{env, fs};

    const SCHEMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/report.schema.json");

    /// One of each event.
    fn samples() -> Vec<Event> {
        let (addr, size, negotiation) = (Hex(1 << 60), Hex(4096), 1);
        let features = || Features::from(1 << 27);
        let totals = || Totals {
            counters: Counters::default(),
            allow_guest_memory: false,
        };
        let start = Start {
            version: "0",
            pid: 1,
            socket: String::new(),
            backend: String::new(),
            r#type: "blk",
            virtio_id: 2,
            region_bytes: 4096,
            region_offset: 0,
            bar_bytes: 4096,
            pool: None,
            transport: String::new(),
            dialect: String::new(),
            mode: String::new(),
            offer_swiotlb: true,
            capability: true,
            access_platform: false,
            packed: false,
            indirect: true,
            event_idx: true,
            allow_guest_memory: false,
            queues: 1,
            queue_size: 256,
            drain: 1000,
            sandbox: true,
            watch: Vec::new(),
        };
        vec![
            Event::Start(start),
            Event::Sandbox(Entered {
                landlock: Landlock::Full,
                sockets: Sockets::Peer,
                instructions: 1,
            }),
            Event::Watch {
                pattern: 0,
                offset: 0,
                pass: 1,
            },
            Event::Session {
                hooks: Value::Null,
                negotiation,
            },
            Event::Backend {
                features: features(),
                pid: None,
                config_bytes: 60,
            },
            Event::Connect,
            Event::Omitted {
                what: String::new(),
            },
            Event::DmaMap {
                addr,
                size,
                fd: false,
                pool: false,
                refused: None,
            },
            Event::DmaUnmap { addr, size },
            Event::Offered {
                features: features(),
                negotiation,
            },
            Event::Accepted {
                features: features(),
                swiotlb: true,
                dmb: false,
                negotiation,
            },
            Event::FeaturesRefused {
                reason: "",
                negotiation,
            },
            Event::DriverOk {
                bar: None,
                region: None,
                region_bytes: 4096,
                negotiation,
            },
            Event::GuestMemory {
                windows: Vec::new(),
                left_out: Vec::new(),
                negotiation,
            },
            Event::Queue {
                index: 0,
                size: 256,
                packed: false,
                desc: addr,
                avail: addr,
                used: addr,
                inside: true,
                negotiation,
            },
            Event::QueueReset {
                index: 0,
                negotiation,
            },
            Event::Violation {
                queue: 0,
                kind: "ring",
                index: 0,
                entry: None,
                addr,
                len: 1,
                negotiation,
            },
            Event::Malformed {
                queue: 0,
                index: 0,
                what: "",
                negotiation,
            },
            Event::BackendMemory {
                when: When::Start,
                table: Vec::new(),
                pid: None,
                mappings: None,
                foreign: None,
                unknown: None,
                negotiation,
            },
            Event::ConfigChanged {
                config: String::new(),
                negotiation,
            },
            Event::NeedsReset {
                reason: String::new(),
                negotiation,
            },
            Event::BackendGone {
                reason: String::new(),
                negotiation,
            },
            Event::Undrained {
                queue: 0,
                requests: None,
                negotiation,
            },
            Event::Reset {
                kind: ResetKind::Status,
                negotiation,
            },
            Event::Disconnect(totals()),
            Event::Summary(totals()),
        ]
    }

    /// The keys of each event, as the schema file has them.
    fn schema_keys() -> BTreeMap<String, BTreeSet<String>> {
        let text = fs::read_to_string(SCHEMA).expect("the schema");
        let schema: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(schema["required"], json!(["t"]));
        let variants = schema["oneOf"].as_array().expect("the events");
        let keys = |variant: &Value| {
            // A variant with a type of its own names it.
            let referred = variant["$ref"].as_str().map(|path| &path[1..]);
            let parts = [Some(variant), referred.and_then(|p| schema.pointer(p))];
            let parts = || parts.into_iter().flatten();
            let properties = parts().flat_map(|part| part["properties"].as_object());
            let keys: BTreeSet<_> = properties.flat_map(|p| p.keys().cloned()).collect();
            let required = parts().flat_map(|part| part["required"].as_array());
            let name = variant["properties"]["event"]["const"].as_str();
            assert_eq!(required.flatten().count(), keys.len(), "{name:?}");
            (name.expect("a name").to_string(), keys)
        };
        variants.iter().map(keys).collect()
    }

    /// WRITE_SCHEMA in the environment has the file written anew.
    #[test]
    fn schema_is_that_of_the_events() {
        let settings = SchemaSettings::draft2020_12().for_serialize();
        let mut schema = settings
            .into_generator()
            .into_root_schema_for::<Line<'static, Event>>();
        schema.insert("title".into(), "a line of the report".into());
        schema.insert(
            "$comment".into(),
            "SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause".into(),
        );
        let text = serde_json::to_string_pretty(&schema).expect("JSON") + "\n";
        if env::var_os("WRITE_SCHEMA").is_some() {
            fs::write(SCHEMA, &text).expect("the schema");
        }
        assert_eq!(fs::read_to_string(SCHEMA).expect("the schema"), text);
    }

    #[test]
    fn events_have_the_keys_of_the_schema() {
        let keys = |event: Event| {
            let value = serde_json::to_value(&event).expect("JSON");
            let fields = value.as_object().expect("an object");
            (event.name(), fields.keys().cloned().collect())
        };
        let samples: BTreeMap<String, BTreeSet<String>> = samples().into_iter().map(keys).collect();
        assert_eq!(samples, schema_keys());
    }

    #[test]
    fn numbers_of_64_bits_are_strings() {
        let event = Event::DmaUnmap {
            addr: Hex(u64::MAX),
            size: Hex(4096),
        };
        let json = serde_json::to_string(&event).expect("JSON");
        let want = r#"{"event":"dma_unmap","addr":"0xffffffffffffffff","size":"0x1000"}"#;
        assert_eq!(json, want);
    }
}
