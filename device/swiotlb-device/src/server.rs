// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vfio-user side: one client at a time, QEMU for one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};
use thiserror::Error;
use vfio_bindings::bindings::vfio::{
    vfio_region_info, vfio_region_sparse_mmap_area, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE,
    VFIO_PCI_BAR4_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_user::{
    DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea,
};

use crate::config::DeviceConfig;
use crate::device::Device;
use crate::guest_memory::Mapping;
use crate::hooks::Hooks;
use crate::panics;
use crate::pci;
use crate::region::{Region, RegionError};
use crate::ring::Window;

/// How often the rings and the backend are looked at without a notification.
const TICK: Duration = Duration::from_millis(10);

/// Why no client is served.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The socket cannot be waited at.
    #[error("cannot wait for a client: {0}")]
    Wait(io::Error),
    /// There are no more threads.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// There is no memory for the region of the next client.
    #[error("no region for the next client: {0}")]
    Region(#[from] RegionError),
}

/// The device as several threads share it.
pub type Shared<H> = Arc<Mutex<Device<H>>>;

/// Never poisoned: a panic with the device locked ends the program.
pub fn lock<H>(device: &Shared<H>) -> MutexGuard<'_, Device<H>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Translates region numbers; everything else is the device's. Never returns
/// an error: the crate would answer it with error number 0.
struct Session<H>(Shared<H>);

impl<H: Hooks> Session<H> {
    /// Does what a message asks for that has just come.
    fn with_device(&self, act: impl FnOnce(&mut Device<H>)) -> io::Result<()> {
        let now = Instant::now();
        panics::own(|| {
            let mut device = lock(&self.0);
            device.hurry(now);
            act(&mut device);
        });
        Ok(())
    }
}

impl<H: Hooks> ServerBackend for Session<H> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.with_device(|device| match region {
            VFIO_PCI_CONFIG_REGION_INDEX => device.config_read(offset, data),
            bar => device.bar_read(bar as usize, offset, data),
        })
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with_device(|device| match region {
            VFIO_PCI_CONFIG_REGION_INDEX => device.config_write(offset, data),
            bar => device.bar_write(bar as usize, offset, data),
        })
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let mapping = Mapping {
            window: Window {
                base: address,
                len: size,
            },
            offset,
            writable: flags.contains(DmaMapFlags::READ_WRITE),
            file: fd,
        };
        self.with_device(|device| device.dma_map(mapping))
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let window = Window {
            base: address,
            len: size,
        };
        let all = flags.contains(DmaUnmapFlags::UNMAP_ALL);
        self.with_device(|device| device.dma_unmap(window, all))
    }

    fn reset(&mut self) -> io::Result<()> {
        self.with_device(Device::reset)
    }

    fn set_irqs(
        &mut self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> io::Result<()> {
        self.with_device(|device| device.set_irqs(index, flags, start, count, fds))
    }
}

/// The nine regions of a VFIO PCI device, most of them empty.
fn regions<H: Hooks>(device: &Device<H>) -> Vec<ServerRegion> {
    let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let region = device.own_region();
    let bar_size = |index| {
        let bar = device.bar(index as usize);
        bar.map_or((0, 0), |bar| (both, bar.size))
    };
    (0..VFIO_PCI_NUM_REGIONS)
        .map(|index| {
            let (flags, size) = match index {
                VFIO_PCI_BAR4_REGION_INDEX if region.is_some() => {
                    let (flags, size) = bar_size(index);
                    (flags | VFIO_REGION_INFO_FLAG_MMAP, size)
                }
                VFIO_PCI_CONFIG_REGION_INDEX => (both, pci::CONFIG_SIZE as u64),
                _ => bar_size(index),
            };
            let mapped = region.filter(|_| index == VFIO_PCI_BAR4_REGION_INDEX);
            // Only the window is memory. Without a list of areas the crate
            // would not send the descriptor at all.
            let area = |region: &Region| SparseArea {
                area: vfio_region_sparse_mmap_area {
                    offset: region.offset(),
                    size: region.size(),
                },
            };
            ServerRegion {
                region_info: vfio_region_info {
                    argsz: std::mem::size_of::<vfio_region_info>() as u32,
                    flags,
                    index,
                    cap_offset: 0,
                    size,
                    offset: 0,
                },
                sparse_areas: mapped.map(area).into_iter().collect(),
                mmap_fd: mapped.map(Region::raw_fd),
            }
        })
        .collect()
}

/// Interrupts: MSI-X. The error interrupt is there because QEMU warns when it
/// is not; nothing ever raises it.
fn irqs(config: &DeviceConfig) -> Vec<IrqInfo> {
    (0..VFIO_PCI_NUM_IRQS)
        .map(|index| {
            let (flags, count) = match index {
                VFIO_PCI_MSIX_IRQ_INDEX => (
                    VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE,
                    config.vectors().into(),
                ),
                VFIO_PCI_ERR_IRQ_INDEX => (VFIO_IRQ_INFO_EVENTFD, 1),
                _ => (0, 0),
            };
            IrqInfo {
                index,
                flags,
                count,
            }
        })
        .collect()
}

/// Starts the thread that calls [`Device::tick`], until the device is dropped.
pub fn tick<H: Hooks>(device: &Shared<H>) -> io::Result<()> {
    let device = Arc::downgrade(device);
    let thread = thread::Builder::new().name("watch".into());
    thread.spawn(move || loop {
        thread::sleep(TICK);
        match device.upgrade() {
            Some(device) => lock(&device).tick(),
            None => return,
        }
    })?;
    Ok(())
}

/// Serves one client after the other; returns after the first if that is to be the only one.
pub fn serve<H: Hooks>(
    config: &DeviceConfig,
    once: bool,
    listener: UnixListener,
    device: &Shared<H>,
) -> Result<(), ServerError> {
    loop {
        // The crate accepts by itself and does not tell.
        match poll(&mut [PollFd::new(&listener, PollFlags::IN)], None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(ServerError::Wait(error.into())),
        }
        lock(device).connected();
        // The region is another one for each client.
        let accepting = OwnedFd::from(listener.try_clone().map_err(ServerError::Wait)?);
        let regions = regions(&lock(device));
        let server = Server::from_owned_fd(accepting, true, irqs(config), regions);
        let mut session = Session(Arc::clone(device));
        // A thread of its own: the crate may panic on a message that makes no
        // sense, which is the end of that thread.
        let thread = thread::Builder::new()
            .name("vfio-user".into())
            .spawn(move || panics::contained(|| server.run(&mut session)))
            .map_err(ServerError::Thread)?;
        match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::info!("the client went away: {error}"),
            Err(_) => log::error!("the client sent something that is not vfio-user"),
        }
        let now = Instant::now();
        let mut left = lock(device);
        left.hurry(now);
        left.disconnected()?;
        drop(left);
        if once {
            return Ok(());
        }
    }
}
