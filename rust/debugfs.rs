// SPDX-License-Identifier: GPL-2.0

//! The files below /sys/kernel/debug/virtio_swiotlb. Their names and keys are an interface, which
//! Documentation/debugfs.rst describes.
//!
//! Every file may be read at any time in the life of its device. All of them may sleep.

use super::{
    bounce::{
        Counters,
        Usage, //
    },
    device::{
        Binding,
        Device, //
    },
    wire::{
        AddressForm,
        At, //
    }, //
};
use file::{
    Command,
    Dir,
    File,
    Text, //
};
use kernel::{
    fmt,
    prelude::*,
    sync::Arc,
    uaccess::UserSliceReader, //
};

pub(crate) mod file;

/// The module's directory.
pub(crate) struct Root(Dir);

impl Root {
    /// Makes the directory.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Dir::new(c"virtio_swiotlb", None)?))
    }

    /// The directory itself.
    pub(crate) fn dir(&self) -> &Dir {
        &self.0
    }
}

/// The files of one device.
pub(crate) struct DeviceFiles {
    _state: File<Device>,
    _counters: File<Device>,
    _pool: File<Device>,
    _reset_hiwater: File<Device>,
}

impl DeviceFiles {
    /// Makes `state`, `counters`, `pool` and `reset_hiwater` in a directory of the device's name.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(root: &Root, device: Arc<Device>) -> Result<Self> {
        let dir = Dir::new(&device.name, Some(&root.0))?;
        Ok(Self {
            _state: File::text::<StateText>(&dir, device.clone()),
            _counters: File::text::<CountersText>(&dir, device.clone()),
            _pool: File::text::<Pool>(&dir, device.clone()),
            _reset_hiwater: File::command::<ResetHiwater>(&dir, device),
        })
    }
}

/// A string of the module's, or `-` for an empty one, so that each line has the same number of
/// words.
fn word(string: &CStr) -> &str {
    match string.to_str() {
        Ok(string) if !string.is_empty() => string,
        _ => "-",
    }
}

fn driver(binding: &Binding) -> &str {
    binding.driver.as_deref().map_or("-", word)
}

/// Writes a device's line of the file `devices`.
pub(crate) fn write_line(f: &mut fmt::Formatter<'_>, device: &Device) -> fmt::Result {
    let binding = device.binding.lock();
    let (name, driver) = (word(&device.name), driver(&binding));
    write!(f, "{name} {driver} {}", binding.mode())?;
    if let Some(bounce) = binding.bounce() {
        let usage = binding.usage();
        let extent = bounce.region().extent();
        write!(f, " {:#x}+{:#x}", extent.start, extent.bytes)?;
        write!(f, " {}/{} bytes", usage.used_bytes, usage.pool_bytes)?;
    }
    if let Some(reason) = binding.reason() {
        write!(f, " ({reason})")?;
    }
    writeln!(f)
}

enum StateText {}

impl Text for StateText {
    type Of = Device;

    const NAME: &'static CStr = c"state";

    fn show(device: &Device, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binding = device.binding.lock();
        writeln!(f, "driver {}", driver(&binding))?;
        writeln!(f, "mode {}", binding.mode())?;
        match binding.reason() {
            Some(reason) => writeln!(f, "reason {reason}")?,
            None => writeln!(f, "reason -")?,
        }
        match binding.bounce() {
            Some(bounce) => {
                let region = bounce.region();
                let extent = region.extent();
                writeln!(f, "region_phys {:#x}", extent.start)?;
                writeln!(f, "region_bus {:#x}", region.device_address())?;
                writeln!(f, "region_bytes {}", extent.bytes)?;
                match extent.at {
                    At::Bar { bar, .. } => writeln!(f, "bar {bar}")?,
                    At::SharedPool { .. } => writeln!(f, "bar -")?,
                }
                writeln!(f, "memory {}", word(region.cache_mode()))?;
                let dialect = match extent.form {
                    AddressForm::Bus => "swiotlb",
                    AddressForm::Offset(_) => "dmb",
                };
                writeln!(f, "dialect {dialect}")?;
                writeln!(f, "source {}", extent.source())?;
                writeln!(f, "lent_bytes {}", bounce.lent())
            }
            None => {
                writeln!(
                    f,
                    "region_phys -\nregion_bus -\nregion_bytes 0\nbar -\nmemory -"
                )?;
                writeln!(f, "dialect -\nsource -\nlent_bytes 0")
            }
        }
    }
}

enum CountersText {}

impl Text for CountersText {
    type Of = Device;

    const NAME: &'static CStr = c"counters";

    fn show(device: &Device, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binding = device.binding.lock();
        write_counters(f, &binding.counters(), &binding.usage())
    }
}

/// Writes counters, as the files `counters` and `totals` have them.
pub(crate) fn write_counters(
    f: &mut fmt::Formatter<'_>,
    counters: &Counters,
    usage: &Usage,
) -> fmt::Result {
    writeln!(f, "maps {}", counters.maps)?;
    writeln!(f, "unmaps {}", counters.unmaps)?;
    writeln!(f, "syncs {}", counters.syncs)?;
    writeln!(f, "bytes_to_device {}", counters.bytes_to_device)?;
    writeln!(f, "bytes_from_device {}", counters.bytes_from_device)?;
    writeln!(f, "allocs {}", counters.allocs)?;
    writeln!(f, "frees {}", counters.frees)?;
    writeln!(f, "full {}", counters.full)?;
    writeln!(f, "too_large {}", counters.too_large)?;
    writeln!(f, "bad_handle {}", counters.bad_handle)?;
    writeln!(f, "pool_bytes {}", usage.pool_bytes)?;
    writeln!(f, "used_bytes {}", usage.used_bytes)?;
    writeln!(f, "hiwater_bytes {}", usage.hiwater_bytes)?;
    writeln!(f, "largest_free_bytes {}", usage.largest_free_bytes)?;
    writeln!(f, "wanted_bytes {}", usage.wanted_bytes)
}

enum Pool {}

impl Text for Pool {
    type Of = Device;

    const NAME: &'static CStr = c"pool";

    fn show(device: &Device, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match device.binding.lock().bounce() {
            Some(bounce) => bounce.picture(f),
            None => writeln!(f, "no pool: the device is not bounced"),
        }
    }
}

enum ResetHiwater {}

impl Command for ResetHiwater {
    type Of = Device;

    const NAME: &'static CStr = c"reset_hiwater";

    fn run(device: &Device, data: &mut UserSliceReader) -> Result {
        let mut written = [0; 4];
        let len = data.len().min(written.len());
        data.read_slice(&mut written[..len])?;
        if written[..len].trim_ascii() != b"1" || !data.is_empty() {
            return Err(EINVAL);
        }
        if let Some(bounce) = device.binding.lock().bounce() {
            bounce.reset_hiwater();
        }
        Ok(())
    }
}
