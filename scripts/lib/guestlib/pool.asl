// SPDX-License-Identifier: GPL-2.0
//
// A pool in guest memory, which the PCI host bridge names. pool.py defines POOL_START,
// POOL_LAST and POOL_BYTES before it.

DefinitionBlock ("", "SSDT", 2, "SWIO", "POOL", 1)
{
	External (\_SB.PCI0, DeviceObj)

	Device (\_SB.RPL0)
	{
		Name (_HID, "PRP0001")
		Name (_UID, Zero)
		Name (_DSD, Package ()
		{
			ToUUID ("daffd814-6eba-4d8c-8a91-bc9bbf4aa301"),
			Package () { Package () { "compatible", "restricted-dma-pool" } }
		})
		Name (_CRS, ResourceTemplate ()
		{
			QWordMemory (ResourceConsumer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite,
				0, POOL_START, POOL_LAST, 0, POOL_BYTES)
		})
	}

	Scope (\_SB.PCI0)
	{
		Name (_DSD, Package ()
		{
			ToUUID ("daffd814-6eba-4d8c-8a91-bc9bbf4aa301"),
			Package () { Package () { "memory-region", Package () { \_SB.RPL0 } } }
		})
	}
}
