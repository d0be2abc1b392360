// SPDX-License-Identifier: GPL-2.0

//! All virtio devices of the guest at one time.

use crate::{
    error::{Error, Result},
    files::{self, Counters, State},
    policy::types::Name,
    root::{Reading, Root},
    DEBUGFS, MODULE,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Bit of VIRTIO_F_SWIOTLB.
pub const SWIOTLB: u32 = 27;
/// Bit of VIRTIO_F_VERSION_1.
pub const VERSION_1: u32 = 32;
/// Bit of VIRTIO_F_ACCESS_PLATFORM.
pub const ACCESS_PLATFORM: u32 = 33;

/// All virtio devices of the guest, and the module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// When it was taken, in seconds since 1970.
    pub time: f64,
    /// The module.
    pub module: Module,
    /// The devices, by number.
    pub devices: Vec<Device>,
}

/// The module, as far as the files show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Whether the module is loaded, or built into the kernel.
    pub loaded: bool,
    /// Whether its files can be read.
    pub files: Files,
    /// Whether sysfs has attributes of the devices that it knows, for each user.
    #[serde(default)]
    pub attributes: bool,
    /// Its parameters, by name.
    pub parameters: BTreeMap<String, String>,
}

/// Whether the module's files in debugfs can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Files {
    /// They can.
    Readable,
    /// The kernel denies access.
    Denied,
    /// There are none.
    Absent,
}

impl Module {
    /// What makes the module's files readable. `None` if they are.
    pub fn remedy(&self) -> Option<&'static str> {
        match (self.loaded, self.files) {
            (_, Files::Readable) => None,
            (false, _) => Some("the module is not loaded; run: modprobe virtio_swiotlb"),
            (true, Files::Denied) => Some(
                "debugfs is for root; run the command as root (root is denied as well if the kernel is locked down)",
            ),
            (true, Files::Absent) => Some(
                "debugfs is not mounted; run as root: mount -t debugfs debugfs /sys/kernel/debug",
            ),
        }
    }

    /// Whether a device without a state is one that the module does not know.
    pub fn shows_all(&self) -> bool {
        self.attributes || self.files == Files::Readable
    }

    /// The bit of VIRTIO_F_DMB, if the parameter `dmb` names one.
    fn dmb(&self) -> Option<u32> {
        let bit = self.parameters.get("dmb")?.parse().ok()?;
        (bit != 0).then_some(bit)
    }
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `virtio3`
    pub name: String,
    /// Its type: `blk`, or a number if the type has no name.
    pub kind: String,
    /// The driver that is bound to it now.
    pub driver: Option<String>,
    /// Whether the link to the driver cannot be read, so that `driver` does not tell.
    #[serde(default)]
    pub driver_hidden: bool,
    /// Whether the driver accepted a feature that confines the device.
    pub feature_accepted: bool,
    /// Whether the driver maps buffers at all: VIRTIO_F_ACCESS_PLATFORM was accepted. Without it
    /// the device is told guest addresses.
    pub maps_buffers: bool,
    /// Whether /proc/iomem has a region under its name.
    pub region_claimed: bool,
    /// What the module decided; `None` if the module does not know the device, or hides it.
    pub state: Option<State>,
    /// Its counters, of which each user may read some; `None` as above.
    pub counters: Option<Counters>,
}

impl Device {
    /// Whether the module bounces the device now.
    pub fn is_bounced(&self) -> bool {
        self.state
            .as_ref()
            .is_some_and(|state| state.mode.is_bounced())
    }

    /// The number of a counter; `None` if it cannot be read.
    pub fn known(&self, key: &str) -> Option<u64> {
        self.counters.as_ref()?.get(key)
    }

    /// The number of a counter; 0 if there is none.
    pub fn counter(&self, key: &str) -> u64 {
        self.known(key).unwrap_or(0)
    }

    /// How much of the pool is in use, from 0 to 1; `None` without a pool.
    pub fn fill(&self) -> Option<f64> {
        let pool = self.counter("pool_bytes");
        (pool != 0).then(|| self.counter("used_bytes") as f64 / pool as f64)
    }
}

impl Snapshot {
    /// Reads all files below `root` now.
    ///
    /// # Errors
    ///
    /// [`Error::NoSysfs`] if sysfs, which has the devices, is not there. [`Error::NoDevices`] if
    /// the virtio bus is there, and its devices cannot be listed.
    pub fn read(root: &Root) -> Result<Self> {
        if root.names("sys/bus").found().is_none() {
            return Err(Error::NoSysfs);
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let module = read_module(root);
        let iomem = root.text("proc/iomem").found().unwrap_or_default();
        let claims = files::parse_claims(&iomem);
        let bus = Path::new("sys/bus/virtio/devices");
        let names = match root.names(bus) {
            Reading::Found(names) => names,
            // A guest without virtio devices need not have the bus.
            Reading::Absent => Vec::new(),
            Reading::Denied => return Err(Error::NoDevices),
        };
        let devices = names
            .into_iter()
            .map(|name| read_device(root, &bus.join(&name), name, &module, &claims));
        Ok(Self {
            time: (now.as_millis() as f64) / 1e3,
            devices: devices.collect(),
            module,
        })
    }
}

fn read_module(root: &Root) -> Module {
    let directory = Path::new(MODULE);
    let files = match root.text(Path::new(DEBUGFS).join("devices")) {
        Reading::Found(_) => Files::Readable,
        Reading::Denied => Files::Denied,
        Reading::Absent => Files::Absent,
    };
    let parameters = directory.join("parameters");
    let names = root.names(&parameters).found().unwrap_or_default();
    let values = names.into_iter().filter_map(|name| {
        let value = root.text(parameters.join(&name)).found()?;
        Some((name, value.trim_end().to_owned()))
    });
    Module {
        loaded: files == Files::Readable || root.names(directory).found().is_some(),
        files,
        attributes: root
            .names(Path::new(MODULE).join("devices"))
            .found()
            .is_some(),
        parameters: values.collect(),
    }
}

fn read_device(
    root: &Root,
    at: &Path,
    name: String,
    module: &Module,
    claims: &BTreeSet<String>,
) -> Device {
    let text = |file| root.text(at.join(file)).found().unwrap_or_default();
    let features = files::parse_features(&text("features"));
    // On the legacy interface bit 27 is another feature.
    let accepted = |bit| features.contains(&bit) && features.contains(&VERSION_1);
    let of_module = |file| root.text(Path::new(DEBUGFS).join(&name).join(file)).found();
    let attribute = |file: &str| {
        let path = Path::new(MODULE).join("devices").join(&name).join(file);
        Some(root.text(path).found()?.trim_end().to_owned())
    };
    let state = of_module("state").and_then(|text| State::parse(&text));
    let counters = of_module("counters").map(|text| Counters::parse(&text));
    let (driver, driver_hidden) = match root.link(at.join("driver")) {
        Reading::Found(driver) => (Some(driver), false),
        // A device that is not there has no link either, and may have a driver.
        Reading::Absent => (None, root.names(at).found().is_none()),
        Reading::Denied => (None, true),
    };
    Device {
        kind: files::parse_type(&text("device"))
            .map_or("-".to_owned(), |kind| Name(kind).to_string()),
        driver,
        driver_hidden,
        feature_accepted: accepted(SWIOTLB) || module.dmb().is_some_and(accepted),
        maps_buffers: features.contains(&ACCESS_PLATFORM),
        region_claimed: claims.contains(&name),
        state: state.or_else(|| State::of_attributes(attribute)),
        counters: counters.or_else(|| Counters::of_attributes(attribute)),
        name,
    }
}
