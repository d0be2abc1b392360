// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk in one process, on a file: what the author of a VMM copies.
//!
//! The library does what is the same for all types of devices: the PCI function with the
//! capability that names the region, the negotiation (R9), the region itself (R22, R25), a
//! check of all that the driver puts into its rings (R2, R3, R4, R26), and threads that take
//! the requests from there. A [`Model`] does the rest: it has the features and the capacity of
//! a disk, and answers requests. (R9 and so on are rules of Documentation/wire-format.rst.)
//!
//! ```text
//! virtio_blk --socket dev.sock --file disk.img
//! qemu-system-x86_64 ... \
//!     -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"dev.sock"}}'
//! ```

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use clap::Parser;
use device_program::listen;
use swiotlb_device::args::parse_pool;
use swiotlb_device::config::DeviceConfig;
use swiotlb_device::device::Device;
use swiotlb_device::hooks::Honest;
use swiotlb_device::in_process::{InProcess, Model};
use swiotlb_device::report::Report;
use swiotlb_device::virtio::bit;
use swiotlb_device::{panics, server, types};
use swiotlb_rings::{CheckedChain, RingMemory, Window};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};

const SECTOR: u64 = 512;
const HEADER: u64 = 16;
/// Buffers of data in a request, at most.
const SEG_MAX: u32 = 126;
const ID: [u8; 20] = *b"swiotlb-example\0\0\0\0\0";
/// Bytes that go to the file or come from it at once.
const CHUNK: u64 = 1 << 16;

/// A disk that cannot touch guest memory, for one client
#[derive(Parser)]
pub struct Args {
    /// vfio-user socket to listen on
    #[arg(long)]
    pub socket: PathBuf,
    /// What is on the disk
    #[arg(long)]
    pub file: PathBuf,
    /// Bytes of the region
    #[arg(long, default_value = "16777216")]
    pub region_size: u64,
    /// A pool in guest memory to work in, instead of a region
    #[arg(long, value_name = "START+BYTES", value_parser = parse_pool, conflicts_with = "region_size")]
    pub pool: Option<Window>,
    /// Offer packed rings
    #[arg(long)]
    pub packed: bool,
    /// Where to write what happens (JSON lines)
    #[arg(long)]
    pub report: Option<PathBuf>,
}

fn main() -> Result<(), Box<dyn Error>> {
    panics::abort_on_panic();
    env_logger::init();
    run(&Args::parse())
}

/// Presents the disk to one client, and returns when that is gone.
pub fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let file = OpenOptions::new().read(true).write(true).open(&args.file)?;
    let sectors = file.metadata()?.len() / SECTOR;
    let disk = Disk { file, sectors };
    let device_type = types::lookup("blk").ok_or("no type of this name")?;
    let mut config = DeviceConfig::new(device_type);
    config.region_size = args.region_size;
    if let Some(pool) = args.pool {
        config.use_pool(pool);
    }
    config.offer.packed = args.packed;
    let config = Arc::new(config);
    let report = Arc::new(Report::new(args.report.as_deref(), false)?);
    let device = Device::new(
        Arc::clone(&config),
        Honest,
        Arc::clone(&report),
        Box::new(InProcess::new(disk)),
    )?;
    let device = Arc::new(Mutex::new(device));
    // A VMM that has the PCI bus in its own process takes no server. It calls `config_read`,
    // `bar_write` and so on where the guest accesses the function, and `tick` by a timer.
    let listener = listen(&args.socket)?;
    server::tick(&device)?;
    let outcome = server::serve(&config, true, listener, &device);
    fs::remove_file(&args.socket)?;
    report.close();
    Ok(outcome?)
}

/// The file, and how many sectors of it the guest sees.
struct Disk {
    file: File,
    sectors: u64,
}

impl Model for Disk {
    fn features(&self) -> u64 {
        bit(VIRTIO_BLK_F_SEG_MAX) | bit(VIRTIO_BLK_F_FLUSH)
    }

    fn config(&self) -> Vec<u8> {
        // virtio 1.4, 5.2.4: `capacity`, `size_max`, `seg_max`.
        let capacity = self.sectors.to_le_bytes();
        [&capacity[..], &[0; 4], &SEG_MAX.to_le_bytes()].concat()
    }

    fn answer(&self, _queue: u16, chain: &CheckedChain, region: &impl RingMemory) -> u32 {
        // The last byte is for the status. Without it there is no way to answer.
        let Some(data) = chain.writable().checked_sub(1) else {
            return 0;
        };
        let (status, written) = match self.carry_out(chain, region, data) {
            Ok(bytes) => (VIRTIO_BLK_S_OK, bytes + 1),
            // The length counts from the first byte on, where nothing may have been written
            // (virtio 1.4, 2.7.8.2).
            Err(error) if error.kind() == ErrorKind::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(_) => (VIRTIO_BLK_S_IOERR, 0),
        };
        chain.write(region, data, &[status as u8]);
        written.try_into().unwrap_or(u32::MAX)
    }
}

impl Disk {
    /// Returns how many bytes of data it has written, of `room`.
    fn carry_out(
        &self,
        chain: &CheckedChain,
        region: &impl RingMemory,
        room: u64,
    ) -> io::Result<u64> {
        // Copied once: the driver can change it at any time, and what is looked at has to be
        // what is used.
        let mut header = [0; HEADER as usize];
        if chain.read(region, 0, &mut header) < header.len() {
            return Err(ErrorKind::InvalidInput.into());
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => {
                self.chunks(sector, room, |done, bytes, at| {
                    self.file.read_exact_at(bytes, at)?;
                    chain.write(region, done, bytes);
                    Ok(())
                })?;
                Ok(room)
            }
            VIRTIO_BLK_T_OUT => {
                self.chunks(sector, chain.readable() - HEADER, |done, bytes, at| {
                    chain.read(region, HEADER + done, bytes);
                    self.file.write_all_at(bytes, at)
                })?;
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => self.file.sync_data().map(|()| 0),
            VIRTIO_BLK_T_GET_ID => {
                let n = ID.len().min(room as usize);
                Ok(chain.write(region, 0, &ID[..n]) as u64)
            }
            _ => Err(ErrorKind::Unsupported.into()),
        }
    }

    /// Calls `each` for the parts of `length` bytes of the disk: how many are done, room for the
    /// part's bytes, and where in the file they belong.
    fn chunks(
        &self,
        sector: u64,
        length: u64,
        mut each: impl FnMut(u64, &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let last = self.sectors.checked_sub(length / SECTOR);
        if length % SECTOR != 0 || last.is_none_or(|last| sector > last) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let mut bytes = vec![0; length.min(CHUNK) as usize];
        for done in (0..length).step_by(CHUNK as usize) {
            let n = (length - done).min(CHUNK) as usize;
            each(done, &mut bytes[..n], SECTOR * sector + done)?;
        }
        Ok(())
    }
}
