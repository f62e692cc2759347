{{- define "shoal.name" -}}
{{- $name := ternary .Release.Name (printf "%s-shoal" .Release.Name) (contains "shoal" .Release.Name) -}}
{{- .Values.fullnameOverride | default $name -}}
{{- end -}}

{{- define "shoal.selector" -}}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* Labels of an object; argument: root, and the component it belongs to. */}}
{{- define "shoal.labels" -}}
{{ include "shoal.selector" .root }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* Labels of a pod: nothing that a new chart or version would change. */}}
{{- define "shoal.podLabels" -}}
{{ include "shoal.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "shoal.image" -}}
{{- $gpus := gt (add .Values.attention.gpus .Values.experts.gpus) 0 -}}
{{- $built := printf "%s%s" .Chart.AppVersion (ternary "-gpu" "" $gpus) -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default $built) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{- define "shoal.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.security.user }}
runAsGroup: {{ int64 .Values.security.user }}
fsGroup: {{ int64 .Values.security.user }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "shoal.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
  {{- with .Values.security.addCapabilities }}
  add: {{ toJson . }}
  {{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- /* What every pod's spec begins with; argument: root, and whether the service account's token is mounted. */}}
{{- define "shoal.podCommon" -}}
automountServiceAccountToken: {{ .token | default false }}
enableServiceLinks: false
{{- with .root.Values.security.serviceAccountName }}
serviceAccountName: {{ . | quote }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext: {{- include "shoal.podSecurity" .root | nindent 2 }}
{{- end -}}

{{- /* Where what is written goes, as the root file system is read-only. */}}
{{- define "shoal.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/shoal
{{- end -}}

{{- define "shoal.scratchVolumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
{{- end -}}

{{- /* Where the service is, and what it takes to call it; argument: root, api and admin: whether their keys are there. */}}
{{- define "shoal.env" -}}
{{- $auth := .root.Values.auth -}}
- name: HOME
  value: /home/shoal
- name: SHOAL_URL
  value: {{ include "shoal.url" .root }}
{{- if .api }}
- name: SHOAL_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ $auth.existingSecret | quote }}, key: {{ $auth.apiKeyEntry | quote }}}
{{- end }}
{{- if .admin }}
- name: SHOAL_ADMIN_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ $auth.existingSecret | quote }}, key: {{ $auth.adminTokenEntry | quote }}}
{{- end }}
{{- end -}}

{{- define "shoal.url" -}}
http://{{ include "shoal.name" . }}.{{ .Release.Namespace }}:{{ int .Values.service.port }}
{{- end -}}

{{- define "shoal.modelId" -}}
{{- .Values.model.servedName | default (base .Values.model.path) -}}
{{- end -}}
