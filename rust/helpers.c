// SPDX-License-Identifier: GPL-2.0

#include <linux/cc_platform.h>
#include <linux/device.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/smp.h>
#include <linux/spinlock.h>
#include <linux/string.h>

#include "helpers.h"

void virtio_swiotlb_device_lock(struct device *dev)
{
	device_lock(dev);
}

void virtio_swiotlb_device_unlock(struct device *dev)
{
	device_unlock(dev);
}

struct resource *virtio_swiotlb_pci_resource(struct pci_dev *pdev, int bar)
{
	return pci_resource_n(pdev, bar);
}

pci_bus_addr_t virtio_swiotlb_pci_bus_address(struct pci_dev *pdev, int bar)
{
	return pci_bus_address(pdev, bar);
}

phys_addr_t virtio_swiotlb_page_to_phys(struct page *page)
{
	return page_to_phys(page);
}

void virtio_swiotlb_copy_in(void *to, phys_addr_t from, size_t len)
{
	memcpy(to, phys_to_virt(from), len);
}

void virtio_swiotlb_copy_out(phys_addr_t to, const void *from, size_t len)
{
	memcpy(phys_to_virt(to), from, len);
}

bool virtio_swiotlb_memory_encrypted(void)
{
	return cc_platform_has(CC_ATTR_MEM_ENCRYPT);
}

unsigned int virtio_swiotlb_cpu(void)
{
	return raw_smp_processor_id();
}

unsigned long virtio_swiotlb_lock(spinlock_t *lock)
{
	unsigned long flags;

	spin_lock_irqsave(lock, flags);
	return flags;
}

bool virtio_swiotlb_trylock(spinlock_t *lock, unsigned long *flags)
{
	return spin_trylock_irqsave(lock, *flags);
}

void virtio_swiotlb_unlock(spinlock_t *lock, unsigned long flags)
{
	spin_unlock_irqrestore(lock, flags);
}

void virtio_swiotlb_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}
