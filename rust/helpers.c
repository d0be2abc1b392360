// SPDX-License-Identifier: GPL-2.0

#include <linux/cc_platform.h>
#include <linux/device.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/rcupdate.h>
#include <linux/smp.h>

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

void *virtio_swiotlb_phys_to_virt(phys_addr_t phys)
{
	return phys_to_virt(phys);
}

bool virtio_swiotlb_memory_encrypted(void)
{
	return cc_platform_has(CC_ATTR_MEM_ENCRYPT);
}

unsigned int virtio_swiotlb_cpu(void)
{
	return raw_smp_processor_id();
}

void virtio_swiotlb_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}
