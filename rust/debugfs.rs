// SPDX-License-Identifier: GPL-2.0

//! The files below /sys/kernel/debug/virtio_swiotlb. Their names and keys are an interface:
//! Documentation/debugfs.rst says what each means.
//!
//! Every file may be read at any time in the life of its device; all of them sleep.

use super::{
    attach::{
        Registry,
        Seen,
        State, //
    },
    bounce::{
        Counters,
        Usage, //
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
    sync::{
        atomic::Relaxed,
        Arc, //
    },
    uaccess::UserSliceReader, //
};

mod file;

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
}

/// The files that speak of all devices.
pub(crate) struct ModuleFiles {
    _devices: File<Registry>,
    _totals: File<Registry>,
}

impl ModuleFiles {
    /// Makes `devices` and `totals`.
    pub(crate) fn new(registry: &Arc<Registry>) -> Self {
        let dir = &registry.root().0;
        Self {
            _devices: File::text::<Devices>(dir, registry.clone()),
            _totals: File::text::<Totals>(dir, registry.clone()),
        }
    }
}

/// The files of one device.
pub(crate) struct DeviceFiles {
    _state: File<Seen>,
    _counters: File<Seen>,
    _pool: File<Seen>,
    _reset_hiwater: File<Seen>,
}

impl DeviceFiles {
    /// Makes `state`, `counters`, `pool` and `reset_hiwater` in a directory of the device's name.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(root: &Root, seen: Arc<Seen>) -> Result<Self> {
        let dir = Dir::new(&seen.name, Some(&root.0))?;
        Ok(Self {
            _state: File::text::<StateText>(&dir, seen.clone()),
            _counters: File::text::<CountersText>(&dir, seen.clone()),
            _pool: File::text::<Pool>(&dir, seen.clone()),
            _reset_hiwater: File::command::<ResetHiwater>(&dir, seen),
        })
    }
}

/// A string of our own making, so that it can be seen and counted as a word when it is empty.
fn word(string: &CStr) -> &str {
    match string.to_str() {
        Ok(string) if !string.is_empty() => string,
        _ => "-",
    }
}

fn driver(state: &State) -> &str {
    state.driver.as_deref().map_or("-", word)
}

enum Devices {}

impl Text for Devices {
    type Of = Registry;

    const NAME: &'static CStr = c"devices";

    fn show(registry: &Registry, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        registry.for_each(|seen| {
            let state = seen.state.lock();
            let mode = state.decision.map_or("negotiating", |d| d.mode());
            write!(f, "{} {} {}", word(&seen.name), driver(&state), mode)?;
            if let Some(bounce) = state.bounce() {
                let usage = state.usage();
                let extent = bounce.region().extent();
                write!(f, " {:#x}+{:#x}", extent.start, extent.bytes)?;
                write!(f, " {}/{} bytes", usage.used_bytes, usage.pool_bytes)?;
            }
            if let Some(reason) = state.decision.and_then(|d| d.reason()) {
                write!(f, " ({reason})")?;
            }
            writeln!(f)
        })
    }
}

enum Totals {}

impl Text for Totals {
    type Of = Registry;

    const NAME: &'static CStr = c"totals";

    fn show(registry: &Registry, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (counters, usage) = registry.totals();
        write_counters(f, &counters, &usage)?;
        let outcomes = &registry.shared().outcomes;
        writeln!(f, "seen {}", outcomes.seen.load(Relaxed))?;
        writeln!(f, "bounced {}", outcomes.bounced.load(Relaxed))?;
        writeln!(f, "hint {}", outcomes.hint.load(Relaxed))?;
        writeln!(f, "declined {}", outcomes.declined.load(Relaxed))?;
        writeln!(f, "refused {}", outcomes.refused.load(Relaxed))
    }
}

enum StateText {}

impl Text for StateText {
    type Of = Seen;

    const NAME: &'static CStr = c"state";

    fn show(seen: &Seen, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = seen.state.lock();
        writeln!(f, "driver {}", driver(&state))?;
        let mode = state.decision.map_or("negotiating", |d| d.mode());
        writeln!(f, "mode {mode}")?;
        match state.decision.and_then(|d| d.reason()) {
            Some(reason) => writeln!(f, "reason {reason}")?,
            None => writeln!(f, "reason -")?,
        }
        match state.bounce() {
            Some(bounce) => {
                let region = bounce.region();
                let extent = region.extent();
                writeln!(f, "region_phys {:#x}", extent.start)?;
                writeln!(f, "region_bus {:#x}", region.bus())?;
                writeln!(f, "region_bytes {}", extent.bytes)?;
                writeln!(f, "bar {}", extent.bar)?;
                writeln!(f, "memory {}", word(region.cache_mode()))
            }
            None => writeln!(
                f,
                "region_phys -\nregion_bus -\nregion_bytes 0\nbar -\nmemory -"
            ),
        }
    }
}

enum CountersText {}

impl Text for CountersText {
    type Of = Seen;

    const NAME: &'static CStr = c"counters";

    fn show(seen: &Seen, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = seen.state.lock();
        write_counters(f, &state.counters(), &state.usage())
    }
}

fn write_counters(f: &mut fmt::Formatter<'_>, counters: &Counters, usage: &Usage) -> fmt::Result {
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
    writeln!(f, "largest_free_bytes {}", usage.largest_free_bytes)
}

enum Pool {}

impl Text for Pool {
    type Of = Seen;

    const NAME: &'static CStr = c"pool";

    fn show(seen: &Seen, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match seen.state.lock().bounce() {
            Some(bounce) => bounce.picture(f),
            None => writeln!(f, "no pool: the device is not bounced"),
        }
    }
}

enum ResetHiwater {}

impl Command for ResetHiwater {
    type Of = Seen;

    const NAME: &'static CStr = c"reset_hiwater";

    fn run(seen: &Seen, data: &mut UserSliceReader) -> Result {
        let mut written = [0; 4];
        let len = data.len().min(written.len());
        data.read_slice(&mut written[..len])?;
        if written[..len].trim_ascii() != b"1" || !data.is_empty() {
            return Err(EINVAL);
        }
        if let Some(bounce) = seen.state.lock().bounce() {
            bounce.reset_hiwater();
        }
        Ok(())
    }
}
