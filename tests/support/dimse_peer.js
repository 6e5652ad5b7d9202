// A DICOM sender and archive made of dcmjs-dimse (npm): what happens is told by lines of JSON.
//
//   node dimse_peer.js OWN_PORT FOLDER NODE_PORT FILE...
//
// Listens, asks a node for C-ECHO, sends files and asks for storage commitment; keeps what it is sent
// in FOLDER until it is ended.
"use strict";

const path = require("path");
const dimse = require("dcmjs-dimse");
const { CEchoRequest, CStoreRequest, NActionRequest } = dimse.requests;
const { CStoreResponse, NEventReportResponse } = dimse.responses;
const { PresentationContextResult, Status, TransferSyntax } = dimse.constants;

const COMMITMENT = "1.2.840.10008.1.20.1";
const [ownPort, folder, nodePort, ...files] = process.argv.slice(2);
const tell = (what) => console.log(JSON.stringify(what));
dimse.log.setLevel("silent");

class Archive extends dimse.Scp {
  associationRequested(association) {
    for (const { id } of association.getPresentationContexts()) {
      const context = association.getPresentationContext(id);
      const offered = context.getTransferSyntaxUids();
      if (offered.includes(TransferSyntax.ExplicitVRLittleEndian)) {
        context.setResult(PresentationContextResult.Accept, TransferSyntax.ExplicitVRLittleEndian);
      } else if (offered.includes(TransferSyntax.ImplicitVRLittleEndian)) {
        context.setResult(PresentationContextResult.Accept, TransferSyntax.ImplicitVRLittleEndian);
      } else {
        context.setResult(PresentationContextResult.RejectTransferSyntaxesNotSupported);
      }
    }
    this.sendAssociationAccept();
  }

  cStoreRequest(request, callback) {
    const instance = request.getAffectedSopInstanceUid();
    request.getDataset().toFile(path.join(folder, `${instance}.dcm`), (error) => {
      const response = CStoreResponse.fromRequest(request);
      response.setStatus(error ? Status.ProcessingFailure : Status.Success);
      tell({ received: instance });
      callback(response);
    });
  }

  nEventReportRequest(request, callback) {
    const report = request.getDataset();
    const named = (tag) =>
      [report.getElement(tag) || []].flat().map((one) => one.ReferencedSOPInstanceUID);
    const response = NEventReportResponse.fromRequest(request);
    response.setStatus(Status.Success);
    callback(response);
    tell({ committed: named("ReferencedSOPSequence"), failed: named("FailedSOPSequence") });
  }

  associationReleaseRequested() {
    this.sendAssociationReleaseResponse();
  }
}

function send(requests, done) {
  const client = new dimse.Client();
  requests.forEach((request) => client.addRequest(request));
  client.on("networkError", (error) => tell({ error: String(error) }));
  client.on("associationRejected", (reason) => tell({ rejected: reason }));
  client.on("associationReleased", done);
  client.send("127.0.0.1", Number(nodePort), "DCMJS", "RECALLSEG");
}

const server = new dimse.Server(Archive);
server.on("networkError", (error) => tell({ error: String(error) }));
server.listen(Number(ownPort));

const echo = new CEchoRequest();
echo.on("response", (response) => tell({ echo: response.getStatus() }));
const stores = files.map((file) => {
  const store = new CStoreRequest(file);
  store.on("response", (response) => tell({ store: response.getStatus() }));
  return store;
});
send([echo, ...stores], () => {
  const action = new NActionRequest(COMMITMENT, `${COMMITMENT}.1`, 1);
  action.setDataset(
    new dimse.Dataset({
      TransactionUID: dimse.Dataset.generateDerivedUid(),
      ReferencedSOPSequence: stores.map((store) => ({
        ReferencedSOPClassUID: store.getAffectedSopClassUid(),
        ReferencedSOPInstanceUID: store.getAffectedSopInstanceUid(),
      })),
    })
  );
  action.on("response", (response) => tell({ action: response.getStatus() }));
  send([action], () => {});
});
