// SPDX-License-Identifier: GPL-2.0
/*
 * Gives the kernel's virtio_mmio driver a PCI function whose BAR 0 begins with the
 * registers of virtio-mmio, and whose interrupt is its first MSI-X vector.
 *
 * QEMU has no virtio-mmio device that a process of its own could serve. It has vfio-user,
 * which presents PCI functions: swiotlb-device --transport mmio is one. For each of
 * them this driver adds a platform device "virtio-mmio", a child of the function.
 *
 * The platform device has the firmware node of the PCI host bridge: what that says of
 * DMA and of reserved memory holds for the function behind the bridge.
 */

#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/ioport.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/platform_device.h>
#include <linux/property.h>

#define GLUE_BAR	0
#define GLUE_BYTES	0x200	/* registers and configuration space */

static struct fwnode_handle *bridge_node(struct pci_dev *pdev)
{
	struct device *bridge = &pci_find_host_bridge(pdev->bus)->dev;

	/* On some boards the bridge's parent has the node. */
	return dev_fwnode(bridge) ?: dev_fwnode(bridge->parent);
}

static int glue_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct resource resources[2];
	struct platform_device_info info = {
		.parent = &pdev->dev,
		.fwnode = bridge_node(pdev),
		.of_node_reused = true,
		.name = "virtio-mmio",
		.id = PLATFORM_DEVID_AUTO,
		.res = resources,
		.num_res = ARRAY_SIZE(resources),
		.dma_mask = DMA_BIT_MASK(64),
	};
	struct platform_device *transport;
	int err;

	if (!(pci_resource_flags(pdev, GLUE_BAR) & IORESOURCE_MEM) ||
	    pci_resource_len(pdev, GLUE_BAR) < GLUE_BYTES)
		return dev_err_probe(&pdev->dev, -ENODEV, "BAR %d has no room for registers\n",
				     GLUE_BAR);

	err = pci_enable_device_mem(pdev);
	if (err)
		return dev_err_probe(&pdev->dev, err, "cannot enable the function\n");

	/* A message is a write by the device. */
	pci_set_master(pdev);
	err = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_MSIX);
	if (err < 0) {
		dev_err_probe(&pdev->dev, err, "cannot allocate a vector of MSI-X\n");
		goto err_disable;
	}

	resources[0] = DEFINE_RES_MEM(pci_resource_start(pdev, GLUE_BAR), GLUE_BYTES);
	/* Where the platform device's claim goes. */
	resources[0].parent = &pdev->resource[GLUE_BAR];
	resources[1] = DEFINE_RES_IRQ(pci_irq_vector(pdev, 0));

	transport = platform_device_register_full(&info);
	if (IS_ERR(transport)) {
		err = PTR_ERR(transport);
		dev_err_probe(&pdev->dev, err, "cannot register the virtio-mmio device\n");
		goto err_free_vectors;
	}

	pci_set_drvdata(pdev, transport);
	return 0;

err_free_vectors:
	pci_free_irq_vectors(pdev);
err_disable:
	pci_clear_master(pdev);
	pci_disable_device(pdev);
	return err;
}

static void glue_remove(struct pci_dev *pdev)
{
	platform_device_unregister(pci_get_drvdata(pdev));
	pci_free_irq_vectors(pdev);
	pci_clear_master(pdev);
	pci_disable_device(pdev);
}

static const struct pci_device_id glue_ids[] = {
	{ PCI_DEVICE(PCI_VENDOR_ID_REDHAT, 0x00aa) },
	{}
};
MODULE_DEVICE_TABLE(pci, glue_ids);

static struct pci_driver glue_driver = {
	.name = "virtio_mmio_glue",
	.id_table = glue_ids,
	.probe = glue_probe,
	.remove = glue_remove,
};
module_pci_driver(glue_driver);

MODULE_DESCRIPTION("virtio-mmio registers in the BAR of a PCI function, for tests");
MODULE_LICENSE("GPL");
